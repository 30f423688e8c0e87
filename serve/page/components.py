"""What the tabs of the page share: how they ask, show, and hand files out."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import html
import json
import logging
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr

from serve.config import ServeConfig
from serve.http import FormParser, SegmentFunction
from serve.http_errors import HttpError
from serve.request_types import EncodedImage, Format, SegmentRequest, SegmentResponse

log = logging.getLogger("ray.serve")
_FILES_S = 3600


class PageBackend:
    """Between Gradio's handlers and the replicas.

    Args:
        ask: puts a question to the replicas.
        config: the present one.
    """

    def __init__(self, ask: SegmentFunction, config: Callable[[], ServeConfig]) -> None:
        self._ask = ask
        self.config = config
        self.reader = FormParser(config)
        self._files = tempfile.TemporaryDirectory(prefix="vilseg-page-")

    @property
    def folder(self) -> str:
        """Where files for browsers are."""
        return self._files.name

    def models(self) -> list[str]:
        """Names of the models, the default first."""
        return list(self.config().models)

    def question(
        self,
        image: bytes,
        names: list[str],
        *,
        model: str,
        background: bool = False,
        bias: float = 0,
        threshold: float = 0,
        format: Format | str = "view",
        seen: EncodedImage | None = None,
    ) -> SegmentRequest:
        """A question as the API would ask it.

        Raises:
            gr.Error: the class list or the model is wrong, as a sentence.
        """
        try:
            return SegmentRequest(
                request_id=f"page-{secrets.token_hex(6)}",
                model=self.reader.model(model),
                image=image,
                vocabulary=self.reader.vocabulary(names, "true" if background else "false"),
                background_bias=bias if background and bias else None,
                threshold=threshold,
                format=format,  # type: ignore[arg-type]
                seen=seen,
            )
        except HttpError as refusal:
            raise gr.Error(refusal.message, title="Please check") from refusal

    async def ask(self, question: SegmentRequest) -> SegmentResponse:
        """The answer.

        Raises:
            gr.Error: it was refused, as a sentence.
        """
        try:
            return await self._ask(question)
        except HttpError as refusal:
            title = "Busy" if refusal.status == 503 else "This does not work"
            raise gr.Error(refusal.message, title=title) from refusal
        except Exception as error:
            # Gradio would show its text, which may name places on the server.
            log.exception("request %s of the page failed", question.request_id)
            raise gr.Error("Something went wrong here; the server's log says what.", title="Sorry") from error

    async def read(self, path: str) -> bytes:
        """An uploaded picture.

        Raises:
            gr.Error: it is larger than a request may be.
        """
        limit = self.config().limits.body_bytes
        if Path(path).stat().st_size > limit:
            raise gr.Error(f"The file has more than {limit:,} bytes, the most that is taken.", title="Too large")
        return await asyncio.to_thread(Path(path).read_bytes)

    def file(self, content: bytes, name: str) -> str:
        """A file for a browser. Its folder is named by its content; a name that a user sent is never used."""
        self._tidy()
        folder = Path(self.folder) / hashlib.sha256(content).hexdigest()[:32]
        folder.mkdir(exist_ok=True)
        path = folder / name
        path.write_bytes(content)
        return str(path)

    def _tidy(self) -> None:
        """Delete what is older than an hour: Gradio made a copy when it was handed out."""
        for folder in Path(self.folder).iterdir():
            if time.time() - folder.stat().st_mtime > _FILES_S:
                shutil.rmtree(folder, ignore_errors=True)


def viewer(name: str, view: dict[str, Any]) -> str:
    """HTML that shows a view; see ``viewer.js``."""
    data = base64.b64encode(json.dumps(view).encode()).decode()
    return f'<vilseg-viewer name="{name}" data="{data}"></vilseg-viewer>'


def empty(text: str) -> str:
    """HTML in the place of a result."""
    return f'<div class="vilseg-empty">{html.escape(text)}</div>'


def class_tags(label: str, **options: Any) -> gr.Dropdown:
    """A field for class names as tags."""
    return gr.Dropdown(
        label=label,
        info="Type a name and press Enter. Synonyms: sofa|couch",
        multiselect=True,
        allow_custom_value=True,
        choices=[],
        value=[],
        **options,
    )
