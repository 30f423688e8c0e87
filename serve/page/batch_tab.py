"""Tab that segments several images, with a download of all masks."""

from __future__ import annotations

import asyncio
import io
import zipfile
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from serve.page.components import PageBackend, class_tags
from vilseg.api_schema import ImageResult
from vilseg.bulk.coco_annotations import write_coco
from vilseg.data.image_decoding import decode_image
from vilseg.segmentation.visualization import draw_overlay

_MAX_IMAGES = 50
_THUMBNAIL_SIDE = 512


def build(backend: PageBackend) -> None:
    """Add the tab to the page."""
    with gr.Row():
        with gr.Column(scale=1, min_width=300):
            files = gr.File(label="Pictures", file_count="multiple", file_types=["image"], elem_id="pictures")
            classes = class_tags("Classes", elem_id="batch-classes")
            background = gr.Checkbox(label="Background")
            model = gr.Dropdown(label="Model", choices=backend.models(), value=backend.models()[0])
            run = gr.Button("Segment all", variant="primary", elem_id="batch")
        with gr.Column(scale=2, min_width=320):
            status = gr.Markdown()
            gallery = gr.Gallery(label="Overlays", columns=3, object_fit="contain", elem_id="batch-gallery")
            archive = gr.File(label="Masks (PNG) and annotations.json (COCO)", interactive=False, elem_id="batch-file")

    async def segment(
        paths: list[str] | None,
        names: list[str],
        has_background: bool,
        model_name: str,
        progress: Any = gr.Progress(),  # noqa: B008  (Gradio looks for it here)
    ) -> tuple[str, list[tuple[str, str]], str | None]:
        return await segment_all(backend, paths or [], names, has_background, model_name, progress)

    run.click(segment, [files, classes, background, model], [status, gallery, archive])


async def segment_all(
    backend: PageBackend, paths: list[str], names: list[str], has_background: bool, model_name: str, progress: Any
) -> tuple[str, list[tuple[str, str]], str | None]:
    """Segment uploaded images one after the other.

    Args:
        backend: Sender of requests to replicas.
        paths: Paths of the uploaded files.
        names: Class list.
        has_background: Add the class background.
        model_name: Name of the model.
        progress: Function that is called with (number of finished images, number of images) before each image.

    Returns:
        Report with the reason for each image that cannot be segmented; overlays as (path, name); path of a ZIP with all
        masks and annotations, None if no image could be segmented.

    Raises:
        gr.Error: There is no image or more than 50, or the class list or the model is invalid.
    """
    if not paths:
        raise gr.Error("Choose pictures first.", title="No pictures")
    if len(paths) > _MAX_IMAGES:
        raise gr.Error(
            f"These are {len(paths)} pictures; the page takes {_MAX_IMAGES} at once. For more there is vilseg segment.",
            title="Too many",
        )
    # Parse the class list first: if it is invalid, the call ends here, so errors in the loop concern single images.
    vocabulary = backend.request(b"", names, model=model_name, background=has_background).vocabulary
    rows: list[dict[str, Any]] = []
    masks: list[tuple[str, bytes]] = []
    overlays: list[tuple[str, str]] = []
    rejected: list[str] = []
    for number, path in enumerate(paths, 1):
        progress((number - 1, len(paths)), unit="pictures")
        name = Path(path).name
        try:
            data = await backend.read(path)
            request = backend.request(data, names, model=model_name, background=has_background, format="json")
            response = await backend.segment(request)
        except gr.Error as error:
            rejected.append(f"- {name}: {error.message}")
            continue
        # Numbered, because two images may have the same name.
        stem = f"{number:03d}-{Path(name).stem}"
        row, mask, overlay = await asyncio.to_thread(_to_files, stem, data, response.body)
        rows.append(row)
        masks.append((f"masks/{stem}.png", mask))
        overlays.append((await asyncio.to_thread(backend.write_file, overlay, f"{number:03d}.webp"), name))
    lines = [f"{len(rows)} of {len(paths)} pictures segmented.", *(["", *rejected] if rejected else [])]
    if not rows:
        return "\n".join(lines), [], None
    archive = await asyncio.to_thread(_zip, rows, masks, vocabulary.classes)
    return "\n".join(lines), overlays, await asyncio.to_thread(backend.write_file, archive, "masks.zip")


def _to_files(stem: str, data: bytes, body: bytes) -> tuple[dict[str, Any], bytes, bytes]:
    """Convert a JSON response to a row for `write_coco`, the mask as PNG, and a small overlay as WebP."""
    answer = ImageResult.model_validate_json(body)
    result, regions = answer.to_segmentation(), answer.regions
    row = {"path": stem, "width": answer.width, "height": answer.height}
    row |= {"classes": [region.class_name for region in regions], "areas": [region.area for region in regions]}
    row |= {"scores": [region.score for region in regions], "rle": [region.rle.counts for region in regions]}
    image = decode_image(data)
    factor = min(1.0, _THUMBNAIL_SIDE / max(image.shape[:2]))
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
