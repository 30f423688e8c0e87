"""ASGI application of the ingress: API and page behind `serve.middleware`."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from serve.api_keys import ApiKeys
from serve.config import ServeConfig
from serve.http.routes import add_routes
from serve.metrics import Metrics
from serve.middleware import App, RequestMiddleware
from serve.request_types import SegmentFunction
from serve.video_uploads import VideoUploads

_DESCRIPTION = """Masks with class names of your own choosing.

Every answer has the header `X-Request-Id`; a request may bring its own. What is refused comes with
`{"error": {"code", "message", "request_id"}}`; after a 503 try again, `Retry-After` says when."""


def make_app(
    *,
    config: Callable[[], ServeConfig],
    keys: ApiKeys | None,
    metrics: Metrics,
    segment: SegmentFunction,
    uploads: VideoUploads,
    is_overloaded: Callable[[], bool] = lambda: False,
) -> App:
    """Build the ASGI application.

    Args:
        config: Function that returns the current configuration, because its models may change.
        keys: API keys; if None, requests from other machines are refused.
        metrics: Metrics to update.
        segment: Function that sends a request to a replica.
        uploads: Receiver of videos.
        is_overloaded: Function that returns True if the replicas would currently refuse an image.
    """
    app = FastAPI(title="vilseg", version=version("vilseg"), description=_DESCRIPTION, redoc_url=None)
    add_routes(app, segment, uploads, metrics, config)
    # Added even if no origin is allowed, because Gradio would allow every origin otherwise.
    app.add_middleware(CORSMiddleware, allow_origins=config().cors_origins, allow_methods=["*"], allow_headers=["*"])
    if config().page:
        from serve.page.blocks import mount_page  # Gradio takes seconds to import

        mount_page(app, segment=segment, uploads=uploads, keys=keys, config=config)
    return RequestMiddleware(
        app,
        keys=keys,
        limits=config().limits,
        metrics=metrics,
        is_overloaded=is_overloaded,
        origins=config().cors_origins,
    )
