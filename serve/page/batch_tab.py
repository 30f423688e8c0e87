"""Compare two class lists or models, many pictures at once, and films."""

from __future__ import annotations

import asyncio
import io
import json
import zipfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from serve.http_errors import HttpError
from serve.page.components import PageBackend, class_tags, empty, viewer
from serve.video_jobs import MASKS, OVERLAY
from serve.video_uploads import VideoUploads
from vilseg import storage
from vilseg.bulk.coco_annotations import write_coco
from vilseg.client import arrays_of
from vilseg.data.image_decoding import decode_image
from vilseg.errors import UserError
from vilseg.segmentation.result import Segmentation
from vilseg.segmentation.visualization import draw_overlay

_MOST_PICTURES = 50
_THUMB_SIDE = 512
_LOOK_EVERY = 1.0
"""Seconds between two looks at how far a film is."""


def build_compare(desk: PageBackend) -> None:
    """Two answers for one picture, side by side."""
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            image = gr.Image(
                label="Picture", type="filepath", sources=["upload", "clipboard"], height=220, elem_id="compare-picture"
            )
            background = gr.Checkbox(label="Background")
            run = gr.Button("Compare", variant="primary", elem_id="compare")
        sides = []
        for letter in "AB":
            with gr.Column(scale=1, min_width=280):
                names = class_tags(f"Classes {letter}", elem_id=f"classes-{letter}")
                model = gr.Dropdown(label=f"Model {letter}", choices=desk.models(), value=desk.models()[0])
                sides.append((names, model))
    with gr.Row():
        shown = [gr.HTML(empty(f"Result {letter}"), elem_id=f"result-{letter}") for letter in "AB"]

    async def compare(path: str | None, has_background: bool, *wished: Any) -> list[str]:
        if not path:
            raise gr.Error("Choose a picture first.", title="No picture")
        data = await desk.read(path)
        questions = [
            desk.question(data, names, model=model, background=has_background)
            for names, model in zip(wished[::2], wished[1::2], strict=True)
        ]
        answers = await asyncio.gather(*map(desk.ask, questions))
        return [viewer(f"compare-{letter}", json.loads(a.body)) for letter, a in zip("AB", answers, strict=True)]

    run.click(compare, [image, background, *(part for side in sides for part in side)], shown)


def build_batch(desk: PageBackend) -> None:
    """Several pictures, and a download of all masks."""
    with gr.Row():
        with gr.Column(scale=1, min_width=300):
            files = gr.File(label="Pictures", file_count="multiple", file_types=["image"], elem_id="pictures")
            classes = class_tags("Classes", elem_id="batch-classes")
            background = gr.Checkbox(label="Background")
            model = gr.Dropdown(label="Model", choices=desk.models(), value=desk.models()[0])
            run = gr.Button("Segment all", variant="primary", elem_id="batch")
        with gr.Column(scale=2, min_width=320):
            said = gr.Markdown()
            gallery = gr.Gallery(label="Overlays", columns=3, object_fit="contain", elem_id="batch-gallery")
            archive = gr.File(label="Masks (PNG) and annotations.json (COCO)", interactive=False, elem_id="batch-file")

    async def segment(
        paths: list[str] | None,
        names: list[str],
        has_background: bool,
        model_name: str,
        progress: Any = gr.Progress(),  # noqa: B008  (Gradio looks for it here)
    ) -> tuple[str, list[tuple[str, str]], str | None]:
        if not paths:
            raise gr.Error("Choose pictures first.", title="No pictures")
        if len(paths) > _MOST_PICTURES:
            raise gr.Error(
                f"These are {len(paths)} pictures; the page takes {_MOST_PICTURES} at once. For more there is vilseg segment.",
                title="Too many",
            )
        rows: list[dict[str, Any]] = []
        masks: list[tuple[str, bytes]] = []
        pictures: list[tuple[str, str]] = []
        refused: list[str] = []
        for number, path in enumerate(paths, 1):
            progress((number - 1, len(paths)), unit="pictures")
            name = Path(path).name
            try:
                data = await desk.read(path)
                question = desk.question(data, names, model=model_name, background=has_background, format="json")
                document = json.loads((await desk.ask(question)).body)
            except gr.Error as error:
                if "classes" in str(error.message).lower() and not rows:
                    raise
                refused.append(f"- {name}: {error.message}")
                continue
            # Numbered, as two pictures may have one name.
            stem = f"{number:03d}-{Path(name).stem}"
            row, mask, overlay = await asyncio.to_thread(_finish, stem, data, document)
            rows.append(row)
            masks.append((f"masks/{stem}.png", mask))
            pictures.append((desk.file(overlay, f"{number:03d}.webp"), name))
        said_text = f"{len(rows)} of {len(paths)} pictures segmented." + "".join(
            f"\n{line}" for line in ["", *refused] if refused
        )
        if not rows:
            return said_text, [], None
        vocabulary = desk.reader.vocabulary(names, "true" if has_background else "false")
        return said_text, pictures, desk.file(_zip(rows, masks, vocabulary.classes), "masks.zip")

    run.click(segment, [files, classes, background, model], [said, gallery, archive])


def _fetch(desk: PageBackend, uri: str, name: str) -> str:
    return desk.file(storage.read_bytes(uri), name)


def _finish(stem: str, data: bytes, document: dict[str, Any]) -> tuple[dict[str, Any], bytes, bytes]:
    """A row for COCO, the mask, and a small overlay of one picture."""
    result = Segmentation(**arrays_of(document))
    regions = document["regions"]
    row = {"path": stem, "width": document["width"], "height": document["height"]}
    row |= {"classes": [r["class"] for r in regions], "areas": [r["area"] for r in regions]}
    row |= {"scores": [r["score"] for r in regions], "rle": [r["rle"]["counts"] for r in regions]}
    image = decode_image(data)
    factor = min(1.0, _THUMB_SIDE / max(image.shape[:2]))
    size = tuple(max(1, round(side * factor)) for side in image.shape[1::-1])
    small = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0))
    labels = np.asarray(Image.fromarray(result.labels).resize(size, Image.Resampling.NEAREST))
    buffer = io.BytesIO()
    draw_overlay(small, labels, result.classes).save(buffer, format="WEBP", quality=85)
    return row, result.to_png_bytes(), buffer.getvalue()


def _zip(rows: list[dict[str, Any]], masks: list[tuple[str, bytes]], classes: tuple[str, ...]) -> bytes:
    annotations, archive = io.BytesIO(), io.BytesIO()
    write_coco(annotations, lambda: rows, classes, lambda row: f"masks/{row['path']}.png")
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as file:
        for name, mask in masks:
            file.writestr(name, mask)
        file.writestr("annotations.json", annotations.getvalue(), zipfile.ZIP_DEFLATED)
        file.writestr("classes.txt", "\n".join(classes) + "\n")
    return archive.getvalue()


def build_video(desk: PageBackend, films: VideoUploads) -> None:
    """A film as a job: the page says how far it is, and shows it in the end."""
    with gr.Row(elem_classes="vilseg-films"):
        with gr.Column(scale=1, min_width=300):
            film = gr.Video(label="Film", sources=["upload"], elem_id="film")
            classes = class_tags("Classes", elem_id="film-classes")
            background = gr.Checkbox(label="Background")
            model = gr.Dropdown(label="Model", choices=desk.models(), value=desk.models()[0])
            every = gr.Slider(1, 30, 6, step=1, label="Look at one frame in", info="More is faster.")
            run = gr.Button("Segment the film", variant="primary", elem_id="film-run")
        with gr.Column(scale=2, min_width=320):
            said = gr.Markdown(elem_id="film-said")
            overlay = gr.Video(label="Overlay", interactive=False, elem_id="film-overlay")
            masks = gr.File(label="A mask (PNG) for every frame", interactive=False, elem_id="film-masks")

    async def segment(
        path: str | None, names: list[str], has_background: bool, model_name: str, key_every: int
    ) -> AsyncIterator[tuple[str, str | None, str | None]]:
        if not path:
            raise gr.Error("Choose a film first.", title="No film")
        try:
            vocabulary = desk.reader.vocabulary(names, "true" if has_background else "false")
            uri = desk.config().models[desk.reader.model(model_name)]
            with Path(path).open("rb") as file:
                video_id = await films.add(file, uri, vocabulary, int(key_every))
            while True:
                state = await films.state(video_id) or {"status": "failed", "error": "The film was deleted."}
                if state["status"] == "failed":
                    raise gr.Error(state["error"], title="This film does not work")
                if state["status"] == "done":
                    break
                yield f"{state['status'].capitalize()}, {state['frames']} frames so far …", None, None
                await asyncio.sleep(_LOOK_EVERY)
            overlay_file, masks_file = [
                await asyncio.to_thread(_fetch, desk, await films.result(video_id, name), name)
                for name in (OVERLAY, MASKS)
            ]
            await films.delete(video_id)  # the page has it now
        except HttpError as refusal:
            raise gr.Error(refusal.message, title="Please check") from refusal
        except UserError as error:
            raise gr.Error("The film cannot be kept here; the server's log says why.", title="Sorry") from error
        listed = ", ".join(entry["class"] for entry in state["classes"])
        yield f"{state['frames']} frames, {state['seconds']:.1f} s: {listed}", overlay_file, masks_file

    run.click(segment, [film, classes, background, model, every], [said, overlay, masks])
