"""A client of the HTTP API of ``vilseg serve``; starts at once, as it needs no torch."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import numpy as np
from PIL import Image

from vilseg.errors import UserError
from vilseg.segmentation.result import Segmentation, label_dtype, no_class

_TRIES = 6
_BATCH = 16
_POLL = 1.0

Picture = str | Path | bytes | np.ndarray | Image.Image


class ServiceError(UserError):
    """The server refused, or does not answer.

    Attributes:
        status: of HTTP; 0 where there was no answer.
        code: what is wrong, for programs.
        request_id: what the server's log calls the request.
    """

    def __init__(self, message: str, *, status: int = 0, code: str = "", request_id: str = "") -> None:
        super().__init__(message)
        self.status, self.code, self.request_id = status, code, request_id


@dataclass(frozen=True)
class Film:
    """A film that was segmented: what `Client.film` gives."""

    id: str
    frames: int
    seconds: float
    classes: list[dict[str, Any]]
    """``class``, ``area`` (mean pixels a frame) and ``score`` of each that is present."""


class Client:
    """Asks a server for segmentations. Waits and tries again where it is busy.

    Args:
        url: as ``vilseg serve`` prints it.
        key: an API key, where the server wants one.
        timeout: seconds to wait for one answer.

    Example: ``vilseg.Client("http://127.0.0.1:8000").segment("photo.jpg", ["cat", "sofa|couch"]).overlay()``
    """

    def __init__(self, url: str, key: str | None = None, *, timeout: float = 120.0) -> None:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        self._http = httpx.Client(base_url=url.rstrip("/"), headers=headers, timeout=timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the connections."""
        self._http.close()

    def models(self) -> list[str]:
        """Names of the models, the default first.

        Raises:
            ServiceError: there was no answer, or a refusal.
        """
        listed = self._ask("GET", "/v1/models").json()["models"]
        return [model["name"] for model in sorted(listed, key=lambda model: not model["default"])]

    def segment(self, image: Picture, classes: Iterable[str], **options: Any) -> Segmentation:
        """Segment one picture.

        Args:
            image: a path, encoded bytes, an (H, W, 3) uint8 RGB array or a PIL image.
            classes: names, with synonyms as ``sofa|couch``.
            options: ``background`` (True, or words), ``threshold``, ``background_bias``, ``model``.

        Returns:
            Labels and regions as the server found them; every pixel of a region has the region's mean score.

        Raises:
            ServiceError: there was no answer, or a refusal.
            OSError: the path cannot be read.
        """
        data = _encoded(image)
        answer = self._ask("POST", "/v1/segment", files=[("image", ("image", data))], data=_form(classes, options))
        return _segmentation(answer.json(), data)

    def batch(
        self, images: Sequence[Picture], classes: Iterable[str], **options: Any
    ) -> list[Segmentation | ServiceError]:
        """Segment many pictures, 16 a request; in the place of one that cannot be used stands the reason.

        Args:
            images: as for `segment`.
            classes: names, with synonyms as ``sofa|couch``.
            options: as for `segment`.

        Raises:
            ServiceError: there was no answer, or all was refused.
            OSError: a path cannot be read.
        """
        form, results = _form(classes, options), []
        for begin in range(0, len(images), _BATCH):
            data = [_encoded(image) for image in images[begin : begin + _BATCH]]
            files = [("images", (str(number), content)) for number, content in enumerate(data)]
            items = self._ask("POST", "/v1/segment/batch", files=files, data=form).json()["results"]
            for item, content in zip(items, data, strict=True):
                done = item["status"] == "ok"
                results.append(_segmentation(item["result"], content) if done else _refusal(422, item["error"]))
        return results

    def film(
        self,
        path: str | Path,
        classes: Iterable[str],
        *,
        overlay: str | Path | None = None,
        masks: str | Path | None = None,
        **options: Any,
    ) -> Film:
        """Segment a film and wait for it.

        Args:
            path: of the film.
            classes: names, with synonyms as ``sofa|couch``.
            overlay: where to write an MP4 of the film with the classes laid over it.
            masks: where to write a ZIP with a PNG for every frame.
            options: ``background``, ``model``, ``key_every``.

        Raises:
            ServiceError: there was no answer, or the film cannot be used.
            OSError: a path cannot be read or written.
        """
        content = Path(path).read_bytes()
        form = _form(classes, options)
        state = self._ask("POST", "/v1/videos", files=[("video", ("film", content))], data=form).json()
        while state["status"] in ("queued", "running"):
            time.sleep(_POLL)
            state = self._ask("GET", state["status_url"]).json()
        if state["status"] == "failed":
            raise ServiceError(state["error"], status=422, code="film_failed")
        for place, url in ((overlay, state["overlay_url"]), (masks, state["masks_url"])):
            if place is not None:
                Path(place).write_bytes(self._ask("GET", url).content)
        self._ask("DELETE", state["status_url"])
        return Film(state["id"], state["frames"], state["seconds"], state["classes"])

    def _ask(self, method: str, path: str, **content: Any) -> httpx.Response:
        for attempt in range(_TRIES):
            try:
                answer = self._http.request(method, path, **content)
            except httpx.TransportError as error:
                raise ServiceError(f"no answer from {self._http.base_url}: {error or type(error).__name__}") from error
            if answer.status_code != 503 or attempt == _TRIES - 1:
                break
            # Longer each time: all who were refused at once should not come back at once.
            time.sleep(float(answer.headers.get("Retry-After", 1)) * (0.5 + attempt))
        if answer.is_success:
            return answer
        try:
            error_body = answer.json()["error"]
        except (ValueError, KeyError, TypeError):
            error_body = {"code": "unknown", "message": f"the server answered {answer.status_code}"}
        raise _refusal(answer.status_code, error_body)


def _refusal(status: int, error: dict[str, Any]) -> ServiceError:
    return ServiceError(error["message"], status=status, code=error["code"], request_id=error.get("request_id", ""))


def _form(classes: Iterable[str], options: dict[str, Any]) -> dict[str, str]:
    form = {name: value for name, value in options.items() if value is not None}
    background = form.get("background")
    if isinstance(background, list | tuple):
        form["background"] = ",".join(background)
    elif isinstance(background, bool):
        form["background"] = "true" if background else "false"
    names = [classes] if isinstance(classes, str) else list(classes)
    return {"classes": json.dumps(names), **{name: str(value) for name, value in form.items()}}


def _encoded(image: Picture) -> bytes:
    if isinstance(image, bytes):
        return image
    if isinstance(image, str | Path):
        return Path(image).read_bytes()
    buffer = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def _segmentation(document: dict[str, Any], data: bytes) -> Segmentation:
    from vilseg.data.image_decoding import decode_image

    return Segmentation(**arrays_of(document), image=decode_image(data, max_pixels=1 << 62))


def arrays_of(document: dict[str, Any]) -> dict[str, Any]:
    """``labels``, ``scores`` and ``classes`` of a `Segmentation` from the JSON of one picture.

    Every pixel of a region has the region's mean score.
    """
    from pycocotools import mask as coco_mask

    shape = (document["height"], document["width"])
    dtype = label_dtype(len(document["classes"]))
    labels, scores = np.full(shape, no_class(dtype), dtype), np.zeros(shape, np.float32)
    for region in document["regions"]:
        mask = coco_mask.decode(region["rle"]).astype(bool)
        labels[mask] = region["class_index"]
        scores[mask] = region["score"]
    return {"labels": labels, "scores": scores, "classes": tuple(document["classes"])}
