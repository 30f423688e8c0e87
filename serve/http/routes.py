"""Routes of the API: images, videos, models, health and metrics."""

from __future__ import annotations

from collections.abc import Callable

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.routing import Match

from serve.config import ServeConfig
from serve.http.error_handlers import ERROR_RESPONSES, add_error_handlers
from serve.http.forms import FormParser
from serve.http.image_routes import add_image_routes
from serve.http.video_routes import add_video_routes
from serve.http_errors import HttpError
from serve.metrics import Metrics
from serve.request_types import SegmentFunction
from serve.video_uploads import VideoUploads
from vilseg import api_schema

_METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"]


def add_routes(
    app: FastAPI,
    segment: SegmentFunction,
    uploads: VideoUploads,
    metrics: Metrics,
    config: Callable[[], ServeConfig],
) -> None:
    """Add all routes and error handlers of the API to ``app``.

    Args:
        app: Application to add to.
        segment: Function that sends a request to a replica.
        uploads: Receiver of videos.
        metrics: Metrics to update and to return at ``/metrics``.
        config: Function that returns the current configuration.
    """
    parser = FormParser(config)
    api = APIRouter(responses=ERROR_RESPONSES)
    add_image_routes(api, segment, parser, metrics)
    add_video_routes(api, uploads, parser, config)

    @api.get("/v1/models", summary="The models that can be asked", response_model=api_schema.Models)
    async def models() -> Response:
        names = list(config().models)
        listed = [api_schema.ModelInfo(name=name, default=name == names[0]) for name in names]
        return _json(api_schema.Models(models=listed).to_json())

    @app.get("/healthz", summary="Health of the server", response_model=api_schema.Health)
    async def healthz() -> Response:
        return _json(api_schema.Health(status="ok").to_json())

    @app.get(
        "/metrics",
        summary="Metrics for Prometheus",
        response_class=Response,
        responses={200: {"content": {"text/plain": {}}}},
    )
    async def prometheus() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    app.include_router(api)

    @app.api_route("/v1/{rest:path}", methods=_METHODS, include_in_schema=False)
    async def unknown(request: Request) -> Response:
        # Without this route, the page, which is mounted at "/", would respond to unknown paths under /v1.
        allowed = {
            method
            for route in api.routes
            if isinstance(route, APIRoute) and route.matches(request.scope)[0] is Match.PARTIAL
            for method in route.methods or ()
        }
        if allowed:
            raise HTTPException(405, headers={"Allow": ", ".join(sorted(allowed))})
        raise HttpError(404, "unknown_route", "There is no such address; /docs lists those there are.")

    add_error_handlers(app, metrics)


def _json(body: bytes) -> Response:
    return Response(body, media_type="application/json")
