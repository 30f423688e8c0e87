"""Handlers of the page's tabs, without a browser."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from pathlib import Path
from typing import Any

import pytest

gr = pytest.importorskip("gradio")

from serve.config import ServeConfig  # noqa: E402
from serve.http_errors import HttpError  # noqa: E402
from serve.page import batch_tab, components, image_tab  # noqa: E402
from serve.request_types import SegmentRequest, SegmentResponse  # noqa: E402

CONTROLS = (["sky"], True, 0.1, "day", "classes", 0.6, 0.0)


def backend_of(segment: Any) -> components.PageBackend:
    config = ServeConfig(models={"day": "/day"})
    return components.PageBackend(segment, lambda: config)


def test_an_image_is_hashed_once_and_nothing_is_hashed_or_parsed_in_the_event_loop(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    image = b"an encoded image" * 1000
    (tmp_path / "upload").write_bytes(image)
    body = b'{"width": 1}' * 100_000
    hashed: list[threading.Thread] = []
    encoded: list[threading.Thread] = []
    sha256, b64encode = hashlib.sha256, components.base64.b64encode

    def recorded_sha256(data: bytes) -> Any:
        hashed.append(threading.current_thread())
        return sha256(data)

    def recorded_b64encode(data: bytes) -> bytes:
        encoded.append(threading.current_thread())
        return b64encode(data)

    def loads(_: Any) -> Any:
        raise AssertionError("the body holds a whole image and is not to be parsed")

    monkeypatch.setattr(hashlib, "sha256", recorded_sha256)
    monkeypatch.setattr(components.base64, "b64encode", recorded_b64encode)
    monkeypatch.setattr(image_tab.json, "loads", loads)

    async def segment(request: SegmentRequest) -> SegmentResponse:
        return SegmentResponse(body=body)

    async def scenario() -> str:
        tab = image_tab.ImageTab(backend_of(segment), image_tab.ImageCache([]))
        html, state = await tab.upload(str(tmp_path / "upload"), *CONTROLS)
        for step in range(5):  # the background slider
            html, state = await tab.show(state, *CONTROLS[:2], step / 10, *CONTROLS[3:])
        return html

    html = asyncio.run(scenario())
    assert sha256(image).hexdigest()[:32] in html, "the link names the image"
    assert len(hashed) == 1
    assert len(encoded) == 6
    assert threading.main_thread() not in hashed + encoded


def test_a_wrong_class_list_ends_the_batch_and_a_wrong_image_does_not(tmp_path: Path) -> None:
    asked: list[SegmentRequest] = []

    async def segment(request: SegmentRequest) -> SegmentResponse:
        asked.append(request)
        # An error of one image, with a word in it that errors of class lists have.
        raise HttpError(422, "not_a_picture", "The image has no classes.")

    paths = [str(tmp_path / name) for name in ("a.jpg", "b.jpg")]
    for path in paths:
        Path(path).write_bytes(b"an image")

    async def run(names: list[str]) -> str:
        return (await batch_tab.segment_all(backend_of(segment), paths, names, False, "day", lambda *_, **__: None))[0]

    report = asyncio.run(run(["sky"]))
    assert report.splitlines()[0] == "0 of 2 pictures segmented."
    assert [line.split(":")[0] for line in report.splitlines()[2:]] == ["- a.jpg", "- b.jpg"]
    assert len(asked) == 2
    with pytest.raises(gr.Error, match="longer than 100 letters"):
        asyncio.run(run(["x" * 101]))
    assert len(asked) == 2
