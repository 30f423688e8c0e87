"""The page as a whole, mounted beside the API."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
from fastapi import FastAPI
from gradio.blocks import Block

from serve.api_keys import ApiKeys
from serve.config import ServeConfig
from serve.http import SegmentFunction
from serve.page import image_tab, other_tabs
from serve.page.components import PageBackend
from serve.page.examples import load_examples
from serve.video_uploads import VideoUploads

_HERE = Path(__file__).parent
_FONTS = ["system-ui", "sans-serif"]
"""Of the reader's own machine: nothing is fetched from elsewhere."""


_TIDY_S, _FILES_S = 600, 24 * 3600
"""Seconds between two looks at Gradio's files, and the age at which one is deleted."""


def mount_page(
    app: FastAPI, *, ask: SegmentFunction, films: VideoUploads, keys: ApiKeys | None, config: Callable[[], ServeConfig]
) -> None:
    """Put the page at ``/``.

    Args:
        app: with the API's routes, which come first.
        ask: puts a question to the replicas.
        films: takes films in.
        keys: whoever has one may log in, with the key as password.
        config: the present one.
    """
    desk = PageBackend(ask, config)
    kept = image_tab.ImageCache(load_examples(config().examples))
    with gr.Blocks(title="vilseg", analytics_enabled=False, delete_cache=(_TIDY_S, _FILES_S)) as demo:
        gr.Markdown("# vilseg\nName what you look for; the picture is cut into regions of these names.")
        with gr.Tab("Picture"):
            image_tab.build(desk, kept, demo)
        with gr.Tab("Compare"):
            other_tabs.build_compare(desk)
        with gr.Tab("Several pictures"):
            other_tabs.build_batch(desk)
        with gr.Tab("Film"):
            other_tabs.build_video(desk, films)
    _harden()
    demo.queue(default_concurrency_limit=16, max_size=64, api_open=False)
    gr.mount_gradio_app(
        app,
        demo,
        path="/",
        auth=None if keys is None else lambda _, key: keys.holder(key) is not None,
        auth_message="Log in with any name, and an API key as the password.",
        allowed_paths=[desk.folder],
        max_file_size=config().limits.video_bytes,
        show_error=True,
        run_history=False,
        footer_links=[],
        ssr_mode=False,
        enable_monitoring=False,
        theme=gr.themes.Default(font=_FONTS, font_mono=["ui-monospace", "monospace"]),
        css=(_HERE / "page.css").read_text(encoding="utf-8"),
        head=f"<script>{(_HERE / 'viewer.js').read_text(encoding='utf-8')}</script>",
    )


def _harden() -> None:
    """Keep Gradio from fetching addresses that a caller sends, and from decoding pictures and films itself.

    In the classes, not in the page's components: Gradio makes those anew for a session once it has updated one.
    """
    if getattr(Block.async_move_resource_to_block_cache, "local", False):
        return
    move = Block.async_move_resource_to_block_cache

    async def move_local(block: Block, resource: Any) -> Any:
        if "://" in str(resource):
            raise gr.Error("Upload the file itself; addresses are not fetched.", title="Not fetched")
        return await move(block, resource)

    move_local.local = True  # type: ignore[attr-defined]
    Block.async_move_resource_to_block_cache = move_local  # type: ignore[method-assign, assignment]
    # Decoding is for the replicas, which check the header before.
    gr.Image.preprocess = gr.Video.preprocess = _path  # type: ignore[method-assign, assignment]


def _path(_: Block, payload: Any) -> str | None:
    if payload is None:
        return None
    return str((getattr(payload, "video", None) or payload).path)
