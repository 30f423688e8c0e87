"""Common code of the tabs of the page: requests to replicas, uploads, downloads, and HTML of results."""

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
"""Age in seconds after which a file for download is deleted."""


class PageBackend:
    """Backend of Gradio's event handlers: sends requests to replicas, reads uploads and writes files for download.

    Args:
        segment: Function that sends a request to a replica.
        config: Function that returns the current configuration.
    """

    def __init__(self, segment: SegmentFunction, config: Callable[[], ServeConfig]) -> None:
        self._segment = segment
        self.config = config
        self.parser = FormParser(config)
        self._files = tempfile.TemporaryDirectory(prefix="vilseg-page-")

    @property
    def directory(self) -> str:
        """Path of the directory of files for download."""
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
        """Build a request; class list and model are checked as in the API.

        Args:
            image: Encoded image.
            names: Class list.
            model: Name of the model.
            background: Add the class background.
            bias: Value added to the score of the class background; 0 takes the one in the model's configuration.
            threshold: Minimum score of a pixel; see `SegmentRequest.threshold`.
            format: Format of the response.
            encoded: Features of the image from an earlier response of the same model.

        Raises:
            gr.Error: The class list or the model is invalid.
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
        """Send a request to a replica and return its response.

        Raises:
            gr.Error: The request failed. The message contains no paths of the server.
        """
        try:
            return await self._segment(request)
        except HttpError as error:
            title = "Busy" if error.status == 503 else "This does not work"
            raise gr.Error(error.message, title=title) from error
        except Exception as error:
            # Gradio would show the message of this exception, which may contain paths of the server.
            log.exception("request %s of the page failed", request.request_id)
            raise gr.Error("Something went wrong here; the server's log says what.", title="Sorry") from error

    async def read(self, path: str) -> bytes:
        """Read an uploaded file.

        Raises:
            gr.Error: The file is larger than ``limits.body_bytes``.
        """
        limit = self.config().limits.body_bytes
        if Path(path).stat().st_size > limit:
            raise gr.Error(f"The file has more than {limit:,} bytes, the most that is taken.", title="Too large")
        return await asyncio.to_thread(Path(path).read_bytes)

    def write_file(self, content: bytes, name: str) -> str:
        """Write a file for download and return its path, in a directory whose name is a hash of the content.

        Hashing and writing block, so call this in a thread.

        Args:
            content: Content of the file.
            name: Name of the file. It must not come from a user, because it becomes part of a path.
        """
        self._delete_old()
        directory = Path(self.directory) / hashlib.sha256(content).hexdigest()[:32]
        directory.mkdir(exist_ok=True)
        path = directory / name
        path.write_bytes(content)
        return str(path)

    def _delete_old(self) -> None:
        """Delete files that are older than an hour; downloads continue, because Gradio makes its own copies."""
        for directory in Path(self.directory).iterdir():
            if time.time() - directory.stat().st_mtime > _FILES_S:
                shutil.rmtree(directory, ignore_errors=True)


def viewer(name: str, body: bytes, context: Mapping[str, Any] | None = None) -> str:
    """Return the HTML element that shows a response of the format ``viewer``; see ``viewer.js``.

    Args:
        name: Name of the element; a new element of the same name keeps the settings of the old one.
        body: Body of the response, which is embedded without parsing, because it contains a whole image.
        context: ``settings``: values of the viewer's settings. ``link``: query parameters for the page's address.
    """
    data = base64.b64encode(body).decode()
    more = html.escape(json.dumps(context or {}))
    return f'<vilseg-viewer name="{name}" context="{more}" data="{data}"></vilseg-viewer>'


def empty(text: str) -> str:
    """Return a placeholder in HTML with ``text``, shown until there is a result."""
    return f'<div class="vilseg-empty">{html.escape(text)}</div>'


def class_tags(label: str, **options: Any) -> gr.Dropdown:
    """Create an input field in which each class name is a tag."""
    return gr.Dropdown(
        label=label,
        info="Type a name and press Enter. Synonyms: sofa|couch",
        multiselect=True,
        allow_custom_value=True,
        choices=[],
        value=[],
        **options,
    )
