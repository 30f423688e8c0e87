"""Error handlers: every error response of the application has the JSON body `vilseg.api_schema.Error`."""

from __future__ import annotations

import re
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from serve.http_errors import HttpError, internal_error
from serve.metrics import Metrics
from vilseg import api_schema

ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    400: {"model": api_schema.Error, "description": "The request is no form, or a broken one."},
    401: {"model": api_schema.Error, "description": "No key, or a wrong one."},
    403: {"model": api_schema.Error, "description": "The server has no keys and answers its own machine only."},
    404: {"model": api_schema.Error, "description": "There is no such model, or video."},
    413: {"model": api_schema.Error, "description": "More bytes or pixels than are taken."},
    422: {"model": api_schema.Error, "description": "Not an image, or a wrong class list or option."},
    503: {
        "model": api_schema.Error,
        "description": "Too busy, or too slow; try again.",
        "headers": {"Retry-After": {"schema": {"type": "integer"}, "description": "Seconds."}},
    },
}
"""Error responses of every route under ``/v1``, for the OpenAPI description."""


def add_error_handlers(app: FastAPI, metrics: Metrics) -> None:
    """Add handlers to ``app`` that turn every exception of a route into an error response, counted in ``metrics``."""

    def respond(request: Request, error: HttpError) -> Response:
        headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
        body = error.body(request.scope.get("vilseg.request_id", ""))
        return Response(body, error.status, headers, "application/json")

    @app.exception_handler(HttpError)
    async def http_error(request: Request, error: HttpError) -> Response:
        metrics.rejected.labels(error.code).inc()
        return respond(request, error)

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        # The exception itself propagates to the middleware, which logs it.
        return respond(request, internal_error())

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:]) or "the request"
        return respond(request, HttpError(422, "invalid", f"{where}: {first['msg']}."))

    @app.exception_handler(HTTPException)
    async def starlette_error(request: Request, error: HTTPException) -> Response:
        code = "bad_request"
        if error.status_code != 400:
            code = re.sub(r"\W+", "_", str(error.detail).lower())[:40].strip("_")
        response = respond(request, HttpError(error.status_code, code, f"{str(error.detail).rstrip('.')}."))
        response.headers.update(error.headers or {})
        return response
