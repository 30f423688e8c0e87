"""Routes of video jobs: ``/v1/videos``."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Annotated, Any, Literal

from fastapi import APIRouter, File, Form, Response, UploadFile
from fastapi.responses import StreamingResponse

from serve.config import ServeConfig
from serve.http.forms import Background, Classes, FormParser, ModelName, VideoId
from serve.http_errors import unknown_video_error
from serve.video_jobs import MASKS, OVERLAY
from serve.video_uploads import VideoUploads
from vilseg import storage
from vilseg.api_schema import VideoState

_READ_BYTES = 1 << 20


def add_video_routes(
    api: APIRouter, uploads: VideoUploads, parser: FormParser, config: Callable[[], ServeConfig]
) -> None:
    """Add the routes to ``api``.

    Args:
        api: Router to add to.
        uploads: Receiver of videos.
        parser: Parser of form fields.
        config: Function that returns the current configuration.
    """

    @api.post(
        "/v1/videos",
        status_code=202,
        summary="Upload a video",
        response_model=VideoState,
    )
    async def add_video(
        video: Annotated[UploadFile, File(description="A video of any usual format.")],
        classes: Classes,
        background: Background = "false",
        model: ModelName = None,
        key_every: Annotated[int, Form(ge=1, le=100, description="The model sees one frame in so many.")] = 6,
    ) -> Response:
        name, vocabulary = parser.model(model), parser.vocabulary(classes, background)
        video_id = await uploads.add(video.file, config().models[name], vocabulary, key_every)
        return _state_response(video_id, {"status": "queued", "frames": 0}, status_code=202)

    @api.get(
        "/v1/videos/{video_id}",
        summary="Progress of a video",
        response_model=VideoState,
    )
    async def video_state(video_id: VideoId) -> Response:
        return _state_response(video_id, await uploads.state(video_id))

    @api.delete(
        "/v1/videos/{video_id}", status_code=204, response_class=Response, summary="Delete a video and its results"
    )
    async def delete_video(video_id: VideoId) -> Response:
        await uploads.delete(video_id)
        return Response(status_code=204)

    @api.get(
        "/v1/videos/{video_id}/{name}",
        summary="Results of a video",
        response_class=Response,
        responses={
            200: {
                "content": {"video/mp4": {}, "application/zip": {}},
                "description": "The overlay video, or a mask a frame.",
            }
        },
    )
    async def video_result(video_id: VideoId, name: Literal["overlay.mp4", "masks.zip"]) -> Response:
        uri = await uploads.result(video_id, name)
        media_type = "video/mp4" if name == OVERLAY else "application/zip"
        return StreamingResponse(_read(uri), media_type=media_type)


def _state_response(video_id: str, state: dict[str, Any] | None, status_code: int = 200) -> Response:
    if state is None:
        raise unknown_video_error()
    url = f"/v1/videos/{video_id}"
    fields = {"id": video_id, "status_url": url, **{name: value for name, value in state.items() if name != "updated"}}
    if state["status"] == "done":
        fields |= {"overlay_url": f"{url}/{OVERLAY}", "masks_url": f"{url}/{MASKS}"}
    body = VideoState.model_validate(fields).to_json()
    return Response(body, status_code, media_type="application/json")


async def _read(uri: str) -> AsyncIterator[bytes]:
    file = await asyncio.to_thread(storage.open_input, uri)
    try:
        while part := await asyncio.to_thread(file.read, _READ_BYTES):
            yield part
    finally:
        file.close()
