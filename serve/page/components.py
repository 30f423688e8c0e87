"""Parts that the tabs of the page share: requests to replicas, uploads, downloads, and HTML of results."""

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
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gradio as gr

from serve.config import ServeConfig
from serve.http.forms import FormParser
from serve.http_errors import HttpError
from serve.request_types import EncodedImage, Format, SegmentFunction, SegmentRequest, SegmentResponse

log = logging.getLogger("ray.serve")
_FILES_S = 3600
"""Age in seconds at which a file for browsers is deleted."""


class PageBackend:
    """Sends requests of Gradio's handlers to the replicas, reads uploads and writes files for browsers.

    Args:
        segment: Sends a request to a replica.
        config: Returns the present configuration.
    """

    def __init__(self, segment: SegmentFunction, config: Callable[[], ServeConfig]) -> None:
        self._segment = segment
        self.config = config
        self.parser = FormParser(config)
        self._files = tempfile.TemporaryDirectory(prefix="vilseg-page-")

    @property
    def directory(self) -> str:
        """Directory of files for browsers."""
        return self._files.name

    def models(self) -> list[str]:
        """Return the names of the models, the default first."""
        return list(self.config().models)

    def request(
        self,
        image: bytes,
        names: list[str],
        *,
        model: str,
        background: bool = False,
        bias: float = 0,
        threshold: float = 0,
        format: Format = "viewer",
        encoded: EncodedImage | None = None,
    ) -> SegmentRequest:
        """Return a request with the limits of the API.

        Raises:
            gr.Error: The class list or the model is wrong.
        """
        try:
            return SegmentRequest(
                request_id=f"page-{secrets.token_hex(6)}",
                model=self.parser.model(model),
                image=image,
                vocabulary=self.parser.vocabulary(names, "true" if background else "false"),
                background_bias=bias if background and bias else None,
                threshold=threshold,
                format=format,
                encoded=encoded,
            )
        except HttpError as error:
            raise gr.Error(error.message, title="Please check") from error

    async def segment(self, request: SegmentRequest) -> SegmentResponse:
        """Return a replica's response.

        Raises:
            gr.Error: The request failed; its text has no paths of the server.
        """
        try:
            return await self._segment(request)
        except HttpError as error:
            title = "Busy" if error.status == 503 else "This does not work"
            raise gr.Error(error.message, title=title) from error
        except Exception as error:
            # Gradio would show its text, which may name paths on the server.
            log.exception("request %s of the page failed", request.request_id)
            raise gr.Error("Something went wrong here; the server's log says what.", title="Sorry") from error

    async def read(self, path: str) -> bytes:
        """Return an uploaded image.

        Raises:
            gr.Error: It is larger than a request may be.
        """
        limit = self.config().limits.body_bytes
        if Path(path).stat().st_size > limit:
            raise gr.Error(f"The file has more than {limit:,} bytes, the most that is taken.", title="Too large")
        return await asyncio.to_thread(Path(path).read_bytes)

    def write_file(self, content: bytes, name: str) -> str:
        """Write a file for a browser and return its path. Its directory is named by its content.

        Hashes the content, so call it in a thread.

        Args:
            content: Content of the file.
            name: Name of the file; never one that a user sent.
        """
        self._delete_old()
        directory = Path(self.directory) / hashlib.sha256(content).hexdigest()[:32]
        directory.mkdir(exist_ok=True)
        path = directory / name
        path.write_bytes(content)
        return str(path)

    def _delete_old(self) -> None:
        """Delete files that are older than an hour: Gradio made a copy when they were downloaded."""
        for directory in Path(self.directory).iterdir():
            if time.time() - directory.stat().st_mtime > _FILES_S:
                shutil.rmtree(directory, ignore_errors=True)


def viewer(name: str, body: bytes, context: Mapping[str, Any] | None = None) -> str:
    """Return HTML that shows a response of the format ``viewer``; see ``viewer.js``.

    Args:
        name: Name of the viewer; viewers of one name share their settings.
        body: Body of the response. It is passed on without being parsed, as it holds a whole image.
        context: ``settings`` to apply and ``link``, the parameters of the page's address.
    """
    data = base64.b64encode(body).decode()
    more = html.escape(json.dumps(context or {}))
    return f'<vilseg-viewer name="{name}" context="{more}" data="{data}"></vilseg-viewer>'


def empty(text: str) -> str:
    """Return HTML for the place of a result that does not exist yet."""
    return f'<div class="vilseg-empty">{html.escape(text)}</div>'


def class_tags(label: str, **options: Any) -> gr.Dropdown:
    """Return a field for class names as tags."""
    return gr.Dropdown(
        label=label,
        info="Type a name and press Enter. Synonyms: sofa|couch",
        multiselect=True,
        allow_custom_value=True,
        choices=[],
        value=[],
        **options,
    )
