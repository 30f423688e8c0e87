"""The HTTP API: routes from forms to questions and from answers to responses; see `serve.schema` for the JSON."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, FastAPI, File, Form, Path, Request, Response, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.routing import Match

from serve import schema
from serve.config import MAX_BATCH_IMAGES, ServeConfig
from serve.http_errors import HttpError, internal_error, unknown_video_error
from serve.metrics import Metrics
from serve.request_types import SegmentRequest, SegmentResponse
from serve.video_jobs import MASKS, OVERLAY
from serve.video_uploads import VideoUploads
from vilseg import storage
from vilseg.errors import DataError
from vilseg.text.vocabulary import Vocabulary

SegmentFunction = Callable[[SegmentRequest], Awaitable[SegmentResponse]]

_CHUNK = 1 << 20
_METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"]
_TRUE, _FALSE = {"true", "1", "yes", "on"}, {"false", "0", "no", "off", ""}
_ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    400: {"model": schema.Error, "description": "The request is no form, or a broken one."},
    401: {"model": schema.Error, "description": "No key, or a wrong one."},
    403: {"model": schema.Error, "description": "The server has no keys and answers its own machine only."},
    404: {"model": schema.Error, "description": "There is no such model, or film."},
    413: {"model": schema.Error, "description": "More bytes or pixels than are taken."},
    422: {"model": schema.Error, "description": "Not a picture, or a wrong class list or option."},
    503: {
        "model": schema.Error,
        "description": "Too busy, or too slow; try again.",
        "headers": {"Retry-After": {"schema": {"type": "integer"}, "description": "Seconds."}},
    },
}

Classes = Annotated[
    str,
    Form(
        description="Names with commas, synonyms after '|'; or a JSON array of such names, which may hold commas.",
        examples=["sky, sofa|couch, cat"],
    ),
]
Background = Annotated[
    str,
    Form(
        description="'true' adds the class background; words with commas say what it is made of. By default it is "
        "there only if classes has it.",
        examples=["true"],
    ),
]
Threshold = Annotated[
    float, Form(ge=0, le=1, description="Pixels of lower scores are background, or no class without one.")
]
Bias = Annotated[
    float | None, Form(ge=-1, le=1, description="Added to the score of the class background; more gives it more.")
]
ModelName = Annotated[str | None, Form(description="One of GET /v1/models; the first of them without it.")]


VideoId = Annotated[str, Path(pattern="^[0-9a-f]{32}$", examples=["0123456789abcdef0123456789abcdef"])]


def _request_id(request: Request) -> str:
    return str(request.scope["vilseg.request_id"])


RequestId = Annotated[str, Depends(_request_id)]


class FormParser:
    """Turns what forms hold into questions, within the limits."""

    def __init__(self, config: Callable[[], ServeConfig]) -> None:
        self._config = config

    def model(self, name: str | None) -> str:
        """The name of a model that is there.

        Raises:
            HttpError: there is none of that name.
        """
        models = self._config().models
        if name in (None, ""):
            return next(iter(models))
        if name not in models:
            raise HttpError(404, "unknown_model", f"There is no such model here; the models are: {', '.join(models)}.")
        return str(name)

    def vocabulary(self, classes: str | list[str], background: str = "false") -> Vocabulary:
        """The class list.

        Raises:
            HttpError: it is empty, too long, or repeats a name.
        """
        limits = self._config().limits
        names = _names(classes) if isinstance(classes, str) else classes
        words = [] if background.strip().lower() in _TRUE | _FALSE else _split(background)
        every = [part for entry in [*names, *words] for part in entry.split("|")]
        if len(every) > limits.classes:
            raise HttpError(
                422, "too_many_classes", f"There are {len(every):,} names; at most {limits.classes:,} are taken."
            )
        if any("\ud800" <= letter <= "\udfff" for name in every for letter in name):
            raise HttpError(422, "bad_classes", "A class name holds half a letter (a lone surrogate).")
        if any(len(name) > limits.text_length for name in every):
            raise HttpError(422, "name_too_long", f"A class name is longer than {limits.text_length} letters.")
        try:
            vocabulary = Vocabulary.of(names)
            if words or background.strip().lower() in _TRUE:
                vocabulary = vocabulary.with_background(words)
        except DataError as error:
            raise HttpError(422, "bad_classes", f"{str(error)[:1].upper()}{str(error)[1:]}.") from error
        return vocabulary


def _names(text: str) -> list[str]:
    if text.lstrip().startswith("["):
        names = json_names(text)
        if names is None:
            raise HttpError(422, "bad_classes", "The class list begins like JSON, but is no array of strings.")
        return names
    return _split(text)


def json_names(text: str) -> list[str] | None:
    """The strings of a JSON array; None where ``text`` is no such array."""
    try:
        names = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else None


def _split(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def add_routes(
    app: FastAPI, ask: SegmentFunction, films: VideoUploads, metrics: Metrics, config: Callable[[], ServeConfig]
) -> None:
    """Add all routes of the API to ``app``."""
    reader = FormParser(config)
    api = APIRouter(responses=_ERROR_RESPONSES)

    @api.post(
        "/v1/segment",
        summary="Segment one picture",
        response_class=Response,
        responses={
            200: {
                "description": "JSON with run-length codes; or the label map, or the overlay, as PNG.",
                "content": {
                    "application/json": {"schema": {"$ref": "#/components/schemas/ImageResult"}},
                    "image/png": {"schema": {"type": "string", "format": "binary"}},
                },
            }
        },
    )
    async def segment(
        request_id: RequestId,
        image: Annotated[UploadFile, File(description="A picture of any usual format.")],
        classes: Classes,
        background: Background = "false",
        threshold: Threshold = 0.0,
        background_bias: Bias = None,
        format: Annotated[Literal["json", "png", "overlay"], Form()] = "json",
        polygons: Annotated[bool, Form(description="Outlines beside the run-length codes.")] = False,
        model: ModelName = None,
    ) -> Response:
        question = SegmentRequest(
            request_id=request_id,
            model=reader.model(model),
            image=await image.read(),
            vocabulary=reader.vocabulary(classes, background),
            background_bias=background_bias,
            threshold=threshold,
            format=format,
            polygons=polygons,
        )
        answer = await ask(question)
        return Response(answer.body, media_type=answer.media_type)

    @api.post(
        "/v1/segment/batch",
        summary="Segment up to 16 pictures",
        response_model=schema.Batch,
    )
    async def segment_batch(
        request_id: RequestId,
        images: Annotated[list[UploadFile], File(min_length=1, max_length=MAX_BATCH_IMAGES)],
        classes: Classes,
        background: Background = "false",
        threshold: Threshold = 0.0,
        background_bias: Bias = None,
        polygons: Annotated[bool, Form()] = False,
        model: ModelName = None,
    ) -> Response:
        name, vocabulary = reader.model(model), reader.vocabulary(classes, background)

        async def one(number: int, image: UploadFile) -> dict[str, Any]:
            question = SegmentRequest(
                request_id=f"{request_id}-{number}",
                model=name,
                image=await image.read(),
                vocabulary=vocabulary,
                background_bias=background_bias,
                threshold=threshold,
                polygons=polygons,
            )
            try:
                answer = await ask(question)
            except HttpError as refusal:
                if refusal.status == 503:
                    raise  # the pictures are all right, so the whole may be sent again
                metrics.rejected.labels(refusal.code).inc()
                error = json.loads(refusal.body(question.request_id))["error"]
                return {"name": image.filename or "", "status": "rejected", "error": error}
            return {"name": image.filename or "", "status": "ok", "result": json.loads(answer.body)}

        tasks = [asyncio.ensure_future(one(number, image)) for number, image in enumerate(images)]
        try:
            results = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        return JSONResponse({"request_id": request_id, "results": results})

    @api.post(
        "/v1/videos",
        status_code=202,
        summary="Hand in a film",
        response_model=schema.VideoState,
    )
    async def add_video(
        video: Annotated[UploadFile, File(description="A film of any usual format.")],
        classes: Classes,
        background: Background = "false",
        model: ModelName = None,
        key_every: Annotated[int, Form(ge=1, le=100, description="The model looks at one frame in so many.")] = 6,
    ) -> Response:
        name, vocabulary = reader.model(model), reader.vocabulary(classes, background)
        video_id = await films.add(video.file, config().models[name], vocabulary, key_every)
        return JSONResponse(_film(video_id, {"status": "queued", "frames": 0}), status_code=202)

    @api.get(
        "/v1/videos/{video_id}",
        summary="How far a film is",
        response_model=schema.VideoState,
    )
    async def video_state(video_id: VideoId) -> Response:
        return JSONResponse(_film(video_id, await films.state(video_id)))

    @api.delete(
        "/v1/videos/{video_id}", status_code=204, response_class=Response, summary="Forget a film and what came of it"
    )
    async def delete_video(video_id: VideoId) -> Response:
        await films.delete(video_id)
        return Response(status_code=204)

    @api.get(
        "/v1/videos/{video_id}/{name}",
        summary="What came of a film",
        response_class=Response,
        responses={
            200: {
                "content": {"video/mp4": {}, "application/zip": {}},
                "description": "The overlay film, or a mask a frame.",
            }
        },
    )
    async def video_result(video_id: VideoId, name: Literal["overlay.mp4", "masks.zip"]) -> Response:
        place = await films.result(video_id, name)
        media_type = "video/mp4" if name == OVERLAY else "application/zip"
        return StreamingResponse(_chunks(place), media_type=media_type)

    @api.get("/v1/models", summary="The models that can be asked", response_model=schema.Models)
    async def models() -> Response:
        names = list(config().models)
        return JSONResponse({"models": [{"name": name, "default": name == names[0]} for name in names]})

    @app.get("/healthz", summary="Whether the server answers", response_model=schema.Health)
    async def healthz() -> Response:
        return JSONResponse({"status": "ok"})

    @app.get(
        "/metrics",
        summary="Figures for Prometheus",
        response_class=Response,
        responses={200: {"content": {"text/plain": {}}}},
    )
    async def figures() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    app.include_router(api)

    @app.api_route("/v1/{rest:path}", methods=_METHODS, include_in_schema=False)
    async def unknown(request: Request) -> Response:
        # The page is mounted behind and would take whatever no route takes.
        allowed = {
            method
            for route in api.routes
            if isinstance(route, APIRoute) and route.matches(request.scope)[0] is Match.PARTIAL
            for method in route.methods or ()
        }
        if allowed:
            raise HTTPException(405, headers={"Allow": ", ".join(sorted(allowed))})
        raise HttpError(404, "unknown_route", "There is no such address; /docs lists those there are.")

    _answer_errors(app, metrics)


def _answer_errors(app: FastAPI, metrics: Metrics) -> None:
    """Every error in the one form that `HttpError` has."""

    def respond(request: Request, refusal: HttpError) -> Response:
        headers = {} if refusal.retry_after is None else {"Retry-After": str(refusal.retry_after)}
        body = refusal.body(request.scope.get("vilseg.request_id", ""))
        return Response(body, refusal.status, headers, "application/json")

    @app.exception_handler(HttpError)
    async def refusal(request: Request, error: HttpError) -> Response:
        metrics.rejected.labels(error.code).inc()
        return respond(request, error)

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        # The error itself goes on to the guard, which logs it.
        return respond(request, internal_error())

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:]) or "the request"
        return respond(request, HttpError(422, "invalid", f"{where}: {first['msg']}."))

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> Response:
        code = (
            re.sub(r"\W+", "_", str(error.detail).lower())[:40].strip("_")
            if error.status_code != 400
            else "bad_request"
        )
        response = respond(request, HttpError(error.status_code, code, f"{str(error.detail).rstrip('.')}."))
        response.headers.update(error.headers or {})
        return response


def _film(video_id: str, state: dict[str, Any] | None) -> dict[str, Any]:
    if state is None:
        raise unknown_video_error()
    url = f"/v1/videos/{video_id}"
    known = {name: value for name, value in state.items() if name != "updated"}
    results = {"overlay_url": f"{url}/{OVERLAY}", "masks_url": f"{url}/{MASKS}"} if state["status"] == "done" else {}
    return {"id": video_id, "status_url": url, **known, **results}


async def _chunks(place: str) -> Any:
    file = await asyncio.to_thread(storage.open_input, place)
    try:
        while chunk := await asyncio.to_thread(file.read, _CHUNK):
            yield chunk
    finally:
        file.close()
