"""The web application of the ingress: API, page, and the guard before both."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from serve.api_keys import ApiKeys
from serve.config import ServeConfig
from serve.http import SegmentFunction, add_routes
from serve.metrics import Metrics
from serve.middleware import App, RequestMiddleware
from serve.video_uploads import VideoUploads

_ABOUT = """Masks with class names of your own choosing.

Every answer has the header `X-Request-Id`; a request may bring its own. What is refused comes with
`{"error": {"code", "message", "request_id"}}`; after a 503 try again, `Retry-After` says when."""


def make_app(
    *,
    config: Callable[[], ServeConfig],
    keys: ApiKeys | None,
    metrics: Metrics,
    ask: SegmentFunction,
    films: VideoUploads,
    is_full: Callable[[], bool] = lambda: False,
) -> App:
    """Everything that answers HTTP.

    Args:
        config: the present one; its models may change.
        keys: None answers this machine alone.
        metrics: to count in.
        ask: puts a question to the replicas.
        films: takes films in.
        is_full: whether pictures would be refused at the moment.
    """
    app = FastAPI(title="vilseg", version=version("vilseg"), description=_ABOUT, redoc_url=None)
    add_routes(app, ask, films, metrics, config)
    # Also where nobody is let in, or Gradio would let in everybody.
    app.add_middleware(CORSMiddleware, allow_origins=config().cors_origins, allow_methods=["*"], allow_headers=["*"])
    if config().page:
        from serve.page.blocks import mount_page  # Gradio takes seconds to import

        mount_page(app, ask=ask, films=films, keys=keys, config=config)
    return RequestMiddleware(
        app,
        keys=keys,
        limits=config().limits,
        metrics=metrics,
        is_full=is_full,
        origins=config().cors_origins,
    )
