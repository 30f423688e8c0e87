"""The whole page with its tabs, mounted into the application of the API."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
from fastapi import FastAPI
from gradio.blocks import Block

from serve.api_keys import ApiKeys
from serve.config import ServeConfig
from serve.page import batch_tab, compare_tab, image_tab, video_tab
from serve.page.components import PageBackend
from serve.page.examples import load_examples
from serve.request_types import SegmentFunction
from serve.video_uploads import VideoUploads

_HERE = Path(__file__).parent
_FONTS = ["system-ui", "sans-serif"]
"""Fonts installed on the user's machine, so that the page fetches none from other servers."""
_CLEANUP_S, _FILES_S = 600, 24 * 3600
"""Seconds between two clean-ups of Gradio's files, and age in seconds after which a file is deleted."""


def mount_page(
    app: FastAPI,
    *,
    segment: SegmentFunction,
    uploads: VideoUploads,
    keys: ApiKeys | None,
    config: Callable[[], ServeConfig],
) -> None:
    """Mount the page at ``/``.

    Args:
        app: Application with the routes of the API, which take precedence.
        segment: Function that sends a request to a replica.
        uploads: Receiver of videos.
        keys: API keys, which are accepted as passwords of the login; if None, there is no login.
        config: Function that returns the current configuration.
    """
    backend = PageBackend(segment, config)
    cache = image_tab.ImageCache(load_examples(config().examples))
    with gr.Blocks(title="vilseg", analytics_enabled=False, delete_cache=(_CLEANUP_S, _FILES_S)) as demo:
        gr.Markdown("# vilseg\nName what you look for; the picture is cut into regions of these names.")
        with gr.Tab("Picture"):
            image_tab.build(backend, cache, demo)
        with gr.Tab("Compare"):
            compare_tab.build(backend)
        with gr.Tab("Several pictures"):
            batch_tab.build(backend)
        with gr.Tab("Video"):
            video_tab.build(backend, uploads)
    _harden()
    demo.queue(default_concurrency_limit=16, max_size=64, api_open=False)
    gr.mount_gradio_app(
        app,
        demo,
        path="/",
        auth=None if keys is None else lambda _, key: keys.holder(key) is not None,
        auth_message="Log in with any name, and an API key as the password.",
        allowed_paths=[backend.directory],
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
    """Prevent Gradio from fetching URLs in requests, and from decoding images and videos itself.

    The patch is on Gradio's classes and not on the components of the page, because Gradio creates new components for a session
    when it updates one.
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
    # Only the replicas decode, after they have checked the size in the header.
    gr.Image.preprocess = gr.Video.preprocess = _path  # type: ignore[method-assign, assignment]


def _path(_: Block, payload: Any) -> str | None:
    if payload is None:
        return None
    return str((getattr(payload, "video", None) or payload).path)
