"""Client for the HTTP API of ``vilseg serve``; imports neither torch nor the server."""

from __future__ import annotations

import io
import json
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx
import numpy as np
from PIL import Image
from pydantic import BaseModel, ValidationError

from vilseg.api_schema import Batch, Error, ErrorBody, ImageResult, Models, VideoState
from vilseg.errors import UserError
from vilseg.segmentation.result import Segmentation

_ATTEMPTS = 6
_BATCH = 16
"""Maximum number of images per request of `Client.batch`."""
_POLL_S = 1.0
_DEFAULT_WAIT_S, _MAX_WAIT_S = 1.0, 60.0
"""Seconds to wait before another attempt if the server sends no Retry-After header, and the maximum wait in seconds."""

_Body = TypeVar("_Body", bound=BaseModel)
ImageInput = str | Path | bytes | np.ndarray | Image.Image
"""Path of an image file, encoded bytes (JPEG, PNG, ...), RGB array of shape (H, W, 3) and type uint8, or PIL image."""


class ServiceError(UserError):
    """Error that the server reported, or no response from it.

    Attributes:
        status: HTTP status; 0 if there was no response.
        code: Machine-readable error code, such as ``not_a_picture``; empty if there was no response.
        request_id: Id of the request in the server's log.
    """

    def __init__(self, message: str, *, status: int = 0, code: str = "", request_id: str = "") -> None:
        super().__init__(message)
        self.status, self.code, self.request_id = status, code, request_id


@dataclass(frozen=True)
class VideoResult:
    """Summary of a segmented video; see `Client.video`."""

    id: str
    """Id of the video job."""
    frames: int
    """Number of frames."""
    seconds: float
    """Duration of the video."""
    classes: list[dict[str, Any]]
    """``class``, ``area`` (mean number of pixels per frame) and ``score`` of each class that occurs in the video."""


class Client:
    """HTTP client that sends images and videos to a server, and retries while the server is busy (status 503).

    Args:
        url: URL of the server, as ``vilseg serve`` prints it.
        key: API key; None if the server has no keys.
        timeout: Seconds to wait for one response.
        transport: Replacement for the network, for tests.

    Example:
        With a fake server that finds sky everywhere:

        >>> def answer(request):
        ...     everywhere = {"size": [2, 4], "counts": "08"}
        ...     sky = {"class": "sky", "class_index": 0, "score": 0.9, "area": 8, "bbox_xywh": [0, 0, 4, 2]}
        ...     result = {"request_id": "1", "model": "default", "width": 4, "height": 2, "classes": ["sky", "sea"]}
        ...     return httpx.Response(200, json={**result, "regions": [{**sky, "rle": everywhere}]})
        >>> image = np.zeros((2, 4, 3), np.uint8)
        >>> with Client("http://127.0.0.1:8000", transport=httpx.MockTransport(answer)) as client:
        ...     result = client.segment(image, ["sky|clouds", "sea"])
        >>> result.labels
        array([[0, 0, 0, 0],
               [0, 0, 0, 0]], dtype=uint8)
        >>> [(region.class_name, region.area) for region in result.regions]
        [('sky', 8)]
    """

    def __init__(
        self, url: str, key: str | None = None, *, timeout: float = 120.0, transport: httpx.BaseTransport | None = None
    ) -> None:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        self._http = httpx.Client(base_url=url.rstrip("/"), headers=headers, timeout=timeout, transport=transport)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def models(self) -> list[str]:
        """Return the names of the models on the server, the default first.

        Raises:
            ServiceError: The server did not respond, or reported an error.
        """
        listed = _decode(Models, self._send("GET", "/v1/models")).models
        return [model.name for model in sorted(listed, key=lambda model: not model.default)]

    def segment(self, image: ImageInput, classes: Iterable[str], **options: Any) -> Segmentation:
        """Segment one image.

        Args:
            image: Path, encoded bytes, RGB array of shape (H, W, 3) and type uint8, or PIL image.
            classes: Class names; synonyms are separated by "|", as in ``sofa|couch``.
            options: Form fields of the request: ``background`` (True adds the class background, a list of words describes
                it), ``threshold``, ``background_bias``, ``model``.

        Returns:
            Labels and regions. The server sends the mean score of each region, so all its pixels have that score.

        Raises:
            ServiceError: The server did not respond, or reported an error.
            OSError: The path cannot be read.
        """
        data = _encode(image)
        response = self._send("POST", "/v1/segment", files=[("image", ("image", data))], data=_form(classes, options))
        return _segmentation(_decode(ImageResult, response), data)

    def batch(
        self, images: Sequence[ImageInput], classes: Iterable[str], **options: Any
    ) -> list[Segmentation | ServiceError]:
        """Segment many images, with up to 16 images per request.

        Args:
            images: Images in any of the forms that `segment` accepts.
            classes: Class names; synonyms are separated by "|", as in ``sofa|couch``.
            options: Form fields of the request, as for `segment`.

        Returns:
            One entry per image, in the order of ``images``: the result, or the error of an image that cannot be segmented.

        Raises:
            ServiceError: The server did not respond, or reported an error that concerns all images.
            OSError: A path cannot be read.
        """
        form = _form(classes, options)
        results: list[Segmentation | ServiceError] = []
        for begin in range(0, len(images), _BATCH):
            data = [_encode(image) for image in images[begin : begin + _BATCH]]
            files = [("images", (str(number), content)) for number, content in enumerate(data)]
            items = _decode(Batch, self._send("POST", "/v1/segment/batch", files=files, data=form)).results
            for item, content in zip(items, data, strict=True):
                if item.error is not None:
                    results.append(_service_error(422, item.error))
                else:
                    assert item.result is not None
                    results.append(_segmentation(item.result, content))
        return results

    def video(
        self,
        path: str | Path,
        classes: Iterable[str],
        *,
        overlay: str | Path | None = None,
        masks: str | Path | None = None,
        **options: Any,
    ) -> VideoResult:
        """Segment a video and wait for the result.

        Args:
            path: Path of the video file.
            classes: Class names; synonyms are separated by "|", as in ``sofa|couch``.
            overlay: Path of an MP4 file to write the video with overlaid classes to; None writes none.
            masks: Path of a ZIP file to write one PNG mask per frame to; None writes none.
            options: Form fields of the request: ``background``, ``model``, ``key_every``.

        Raises:
            ServiceError: The server did not respond, or the video cannot be segmented.
            OSError: A path cannot be read or written.
        """
        files = [("video", ("video", Path(path).read_bytes()))]
        state = _decode(VideoState, self._send("POST", "/v1/videos", files=files, data=_form(classes, options)))
        while state.status in ("queued", "running"):
            time.sleep(_POLL_S)
            state = _decode(VideoState, self._send("GET", state.status_url))
        if state.status == "failed":
            raise ServiceError(state.error or "the video cannot be segmented", status=422, code="film_failed")
        for place, url in ((overlay, state.overlay_url), (masks, state.masks_url)):
            if place is not None and url is not None:
                Path(place).write_bytes(self._send("GET", url).content)
        self._send("DELETE", state.status_url)
        classes_found = [entry.model_dump(by_alias=True) for entry in state.classes or []]
        return VideoResult(state.id, state.frames, state.seconds or 0.0, classes_found)

    film = video
    """Earlier name of `video`."""

    def _send(self, method: str, path: str, **content: Any) -> httpx.Response:
        for attempt in range(_ATTEMPTS):
            try:
                response = self._http.request(method, path, **content)
            except httpx.TransportError as error:
                raise ServiceError(f"no answer from {self._http.base_url}: {error or type(error).__name__}") from error
            if response.status_code != 503 or attempt == _ATTEMPTS - 1:
                break
            # Wait longer after each attempt, so that clients that were refused together do not retry together.
            time.sleep(min(_MAX_WAIT_S, seconds_until_retry(response.headers.get("Retry-After")) * (0.5 + attempt)))
        if response.is_success:
            return response
        try:
            error_body = Error.model_validate_json(response.content).error
        except ValidationError:
            message = f"the server answered {response.status_code}"
            error_body = ErrorBody(code="unknown", message=message, request_id="")
        raise _service_error(response.status_code, error_body)


def seconds_until_retry(header: str | None) -> float:
    """Return the number of seconds that a ``Retry-After`` header specifies, at most 60.

    Args:
        header: Number of seconds or an HTTP date (RFC 9110, section 10.2.3). None and any other text give 1 second.

    Example:
        >>> seconds_until_retry("5"), seconds_until_retry(None), seconds_until_retry("86400")
        (5.0, 1.0, 60.0)
        >>> seconds_until_retry("Wed, 21 Oct 2015 07:28:00 GMT")  # in the past
        0.0
    """
    try:
        seconds = float(header or _DEFAULT_WAIT_S)
    except ValueError:
        try:
            date = parsedate_to_datetime(header or "")
        except ValueError:
            return _DEFAULT_WAIT_S
        # The zone "-0000" gives a date without time zone, which is in UTC (RFC 5322, section 3.3).
        seconds = (date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds()
    if math.isnan(seconds):
        return _DEFAULT_WAIT_S
    return min(_MAX_WAIT_S, max(0.0, seconds))


def _decode(schema: type[_Body], response: httpx.Response) -> _Body:
    """Decode the JSON body of a successful response.

    Raises:
        ServiceError: The body does not match ``schema``, such as the login page of a proxy.
    """
    try:
        return schema.model_validate_json(response.content)
    except ValidationError as error:
        sentence = f"{response.url} did not answer as vilseg serve does; check the URL"
        raise ServiceError(sentence, status=response.status_code, code="unknown") from error


def _service_error(status: int, error: ErrorBody) -> ServiceError:
    return ServiceError(error.message, status=status, code=error.code, request_id=error.request_id)


def _form(classes: Iterable[str], options: dict[str, Any]) -> dict[str, str]:
    form = {name: value for name, value in options.items() if value is not None}
    background = form.get("background")
    if isinstance(background, list | tuple):
        form["background"] = ",".join(background)
    elif isinstance(background, bool):
        form["background"] = "true" if background else "false"
    names = [classes] if isinstance(classes, str) else list(classes)
    return {"classes": json.dumps(names), **{name: str(value) for name, value in form.items()}}


def _encode(image: ImageInput) -> bytes:
    if isinstance(image, bytes):
        return image
    if isinstance(image, str | Path):
        return Path(image).read_bytes()
    buffer = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def _segmentation(result: ImageResult, data: bytes) -> Segmentation:
    from vilseg.data.image_decoding import decode_image

    return result.to_segmentation(decode_image(data, max_pixels=1 << 62))
