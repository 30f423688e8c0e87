"""Tab that shows two class lists or models side by side."""

from __future__ import annotations

import asyncio
from typing import Any

import gradio as gr

from serve.page.components import PageBackend, class_tags, empty, viewer


def build(backend: PageBackend) -> None:
    """Add the tab to the page."""
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
                model = gr.Dropdown(label=f"Model {letter}", choices=backend.models(), value=backend.models()[0])
                sides.append((names, model))
    with gr.Row():
        results = [gr.HTML(empty(f"Result {letter}"), elem_id=f"result-{letter}") for letter in "AB"]

    async def compare(path: str | None, has_background: bool, *values: Any) -> list[str]:
        if not path:
            raise gr.Error("Choose a picture first.", title="No picture")
        data = await backend.read(path)
        requests = [
            backend.request(data, names, model=model, background=has_background)
            for names, model in zip(values[::2], values[1::2], strict=True)
        ]
        responses = await asyncio.gather(*map(backend.segment, requests))
        return [
            await asyncio.to_thread(viewer, f"compare-{letter}", response.body)
            for letter, response in zip("AB", responses, strict=True)
        ]

    run.click(compare, [image, background, *(part for side in sides for part in side)], results)
