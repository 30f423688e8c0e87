"""Tab that segments a video as a job, with its progress and its results."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import gradio as gr

from serve.http_errors import HttpError
from serve.page.components import PageBackend, class_tags
from serve.video_jobs import MASKS, OVERLAY
from serve.video_uploads import VideoUploads
from vilseg import storage
from vilseg.errors import UserError

_POLL_S = 1.0
"""Seconds between two queries of a video's state."""


def build(backend: PageBackend, uploads: VideoUploads) -> None:
    """Add the tab to the page."""
    with gr.Row(elem_classes="vilseg-videos"):
        with gr.Column(scale=1, min_width=300):
            video = gr.Video(label="Video", sources=["upload"], elem_id="video")
            classes = class_tags("Classes", elem_id="video-classes")
            background = gr.Checkbox(label="Background")
            model = gr.Dropdown(label="Model", choices=backend.models(), value=backend.models()[0])
            every = gr.Slider(1, 30, 6, step=1, label="Segment one frame in", info="More is faster.")
            run = gr.Button("Segment the video", variant="primary", elem_id="video-run")
        with gr.Column(scale=2, min_width=320):
            status = gr.Markdown(elem_id="video-status")
            overlay = gr.Video(label="Overlay", interactive=False, elem_id="video-overlay")
            masks = gr.File(label="A mask (PNG) for every frame", interactive=False, elem_id="video-masks")

    async def segment(
        path: str | None, names: list[str], has_background: bool, model_name: str, key_every: int
    ) -> AsyncIterator[tuple[str, str | None, str | None]]:
        if not path:
            raise gr.Error("Choose a video first.", title="No video")
        try:
            vocabulary = backend.parser.vocabulary(names, "true" if has_background else "false")
            uri = backend.config().models[backend.parser.model(model_name)]
            with Path(path).open("rb") as file:
                video_id = await uploads.add(file, uri, vocabulary, int(key_every))
            while True:
                state = await uploads.state(video_id) or {"status": "failed", "error": "The video was deleted."}
                if state["status"] == "failed":
                    raise gr.Error(state["error"], title="This video does not work")
                if state["status"] == "done":
                    break
                yield f"{state['status'].capitalize()}, {state['frames']} frames so far …", None, None
                await asyncio.sleep(_POLL_S)
            overlay_file, masks_file = [
                await asyncio.to_thread(_fetch, backend, await uploads.result(video_id, name), name)
                for name in (OVERLAY, MASKS)
            ]
            await uploads.delete(video_id)  # the page has copies now
        except HttpError as error:
            raise gr.Error(error.message, title="Please check") from error
        except UserError as error:
            raise gr.Error("The video cannot be kept here; the server's log says why.", title="Sorry") from error
        present = ", ".join(entry["class"] for entry in state["classes"])
        yield f"{state['frames']} frames, {state['seconds']:.1f} s: {present}", overlay_file, masks_file

    run.click(segment, [video, classes, background, model, every], [status, overlay, masks])


def _fetch(backend: PageBackend, uri: str, name: str) -> str:
    return backend.write_file(storage.read_bytes(uri), name)
