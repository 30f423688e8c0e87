"""Read and write video files as sequences of upright frames with timestamps, with PyAV (extra ``video``)."""

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vilseg import storage
from vilseg.errors import DataError, TooLargeError, UserError

_MAX_PIXELS = 100_000_000
"""Default maximum of width x height, as for images. It is needed because a damaged header may state any size."""

_FORMATS = (
    "mov,matroska,avi,mpegts,mpeg,mpegvideo,m4v,h264,hevc,av1,obu,ivf,flv,live_flv,asf,ogg,gif,apng,webp_anim,mxf,mxf_opatom,"
    "gxf,nut,nsv,dv,rm,wtv,wav,mp3,flac,yuv4mpegpipe,mjpeg,vc1,dhav,3gp,swf,smk,bink,cavsvideo,dirac,film_cpk"
)
"""Allowed demuxers of FFmpeg. Formats that refer to other files or URLs, such as playlists, are left out, because uploads are not
trusted."""

_FORMATS_WITH_DURATION = ("mov,mp4", "matroska", "avi")
"""Formats whose header states the duration of the video; for other formats FFmpeg estimates it."""

_ENCODERS = {"libx264": {"crf": "20", "preset": "veryfast"}, "mpeg4": {"qmin": "2", "qmax": "6"}}
"""Encoders in order of preference, with settings that keep edges sharp: H.264 if PyAV's FFmpeg was built with it, otherwise
MPEG-4 part 2."""

_TICKS_PER_SECOND = 60_000
"""Time base of written videos in ticks per second: usual frame rates need whole ticks, and MPEG-4 allows at most 65535."""


@dataclass(frozen=True, eq=False)
class Frame:
    """One frame of a video."""

    index: int
    """Number of the frame, from 0, in display order."""
    seconds: float
    """Display time in seconds after the first frame; frames of a variable rate keep their own times."""
    image: np.ndarray
    """(H, W, 3) uint8 RGB, upright."""


def read_frames(path: str | Path, *, max_pixels: int | None = None) -> Iterator[Frame]:
    """Yield the frames of the first video stream of a file, decoded on demand.

    Rotation recorded by the camera is applied, in quarter turns. If the size changes within the video, frames are resized to the
    size of the first. Non-square pixels are not corrected.

    Args:
        path: path or URI of the video; an object in an object store is copied to a temporary file first.
        max_pixels: maximum width x height of the frames; None allows 100 million.

    Raises:
        TooLargeError: the frames have more than ``max_pixels`` pixels.
        DataError: the file is not a video, has no video stream or no frame, or is damaged or truncated. If it is damaged or
            truncated, all frames that can be decoded before that are yielded first.
        StorageError: the file cannot be read.
        UserError: PyAV is not installed.
    """
    av = _import_av()
    uri = str(path)
    with storage.local_copy(uri) as local:
        storage.open_input(
            str(local)
        ).close()  # gives a better message than FFmpeg for a directory or a missing permission
        try:
            container = av.open(str(local), options={"format_whitelist": _FORMATS})
        except (av.error.FFmpegError, OSError) as error:
            raise DataError(f"{uri} is not a video of a known format, or its head or index is damaged") from error
        with container:
            if not container.streams.video:
                raise DataError(f"{uri} has no video stream")
            yield from _decode(av, container, uri, max_pixels or _MAX_PIXELS)


def _decode(av: Any, container: Any, uri: str, limit: int) -> Iterator[Frame]:
    stream = container.streams.video[0]
    width, height = stream.codec_context.width, stream.codec_context.height
    if width * height > limit:
        raise TooLargeError(f"{uri} has frames of {width} x {height} pixels, more than the limit of {limit:,}")
    step = float(1 / stream.average_rate) if stream.average_rate else 1 / 25
    start, seconds, duration, size = 0.0, -step, step, None
    decoded = container.decode(stream)
    for index in itertools.count():
        try:
            frame = next(decoded, None)
        except (av.error.FFmpegError, OSError) as error:
            raise DataError(f"{uri} is damaged after {_decoded_extent(index, seconds + duration)}") from error
        if frame is None:
            break
        if frame.time is None:
            seconds += duration
        else:
            start = frame.time if index == 0 else start
            seconds = frame.time - start
        duration = float(frame.duration * frame.time_base) if frame.duration else step
        if frame.width * frame.height > limit:  # the header may state another size
            raise TooLargeError(f"{uri} has a frame of {frame.width} x {frame.height} pixels, more than {limit:,}")
        image = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))
        size = size or image.shape[1::-1]
        if image.shape[1::-1] != size:
            image = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))
        yield Frame(index, seconds, np.ascontiguousarray(image))
    if size is None:
        raise DataError(f"{uri} has a video stream without a frame that can be decoded")
    stated, end = _stated_seconds(container, stream), seconds + duration
    if stated is not None and stated - end > max(0.5, 0.02 * stated):
        raise DataError(f"{uri} is cut short after {_decoded_extent(index, end)}: its header says {stated:.2f} s")


def _decoded_extent(frames: int, seconds: float) -> str:
    """Describe the part of a video that was decoded, for an error message."""
    return f"{frames} frames ({max(0.0, seconds):.2f} s)"


def _stated_seconds(container: Any, stream: Any) -> float | None:
    """Return the duration that the header states, in seconds; None if it states none."""
    if not container.format.name.startswith(_FORMATS_WITH_DURATION):
        return None
    if stream.duration is not None:
        return float(stream.duration * stream.time_base)
    tag = stream.metadata.get("DURATION", "").split(":")  # Matroska: 00:01:02.500000000
    if len(tag) == 3:
        hours, minutes, rest = (float(part) for part in tag)
        return 3600 * hours + 60 * minutes + rest
    alone = len(container.streams) == 1  # sound may last longer than the video stream
    return container.duration / 1e6 if alone and container.duration is not None else None


def write_video(uri: str, frames: Iterable[Frame]) -> None:
    """Write frames with their display times as an MP4 file, encoded as H.264 (MPEG-4 part 2 if PyAV has no H.264).

    The encoder needs even sides, so the last row or column of an image with an odd side is repeated. The file is created
    atomically: if an exception occurs, also one raised by ``frames``, no file appears.

    Args:
        uri: path or URI of the file.
        frames: frames of equal size, in display order.

    Raises:
        DataError: there is no frame, or a frame differs in size from the first.
        StorageError: the file cannot be written.
        UserError: PyAV is not installed.
    """
    av = _import_av()
    iterator = iter(frames)
    first = next(iterator, None)
    if first is None:
        raise DataError(f"there is no frame to write to {uri}")
    encoder = next(name for name in _ENCODERS if name in av.codecs_available)
    height, width = first.image.shape[:2]
    tick = -1
    with storage.open_atomic(uri) as file, av.open(file, "w", format="mp4") as container:
        stream = container.add_stream(encoder, rate=_TICKS_PER_SECOND, options=_ENCODERS[encoder])
        stream.width, stream.height, stream.pix_fmt = width + width % 2, height + height % 2, "yuv420p"
        stream.codec_context.time_base = Fraction(1, _TICKS_PER_SECOND)
        for frame in itertools.chain([first], iterator):
            if frame.image.shape != first.image.shape:
                there, here = (f"{image.shape[1]} x {image.shape[0]}" for image in (frame.image, first.image))
                raise DataError(f"frame {frame.index} of {uri} has {there} pixels, and the first one {here}")
            even = np.pad(frame.image, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
            video_frame = av.VideoFrame.from_ndarray(even, format="rgb24")
            tick = max(tick + 1, math.floor(frame.seconds * _TICKS_PER_SECOND + 0.5))  # times must increase
            video_frame.pts, video_frame.time_base = tick, Fraction(1, _TICKS_PER_SECOND)
            container.mux(stream.encode(video_frame))
        container.mux(stream.encode(None))


def _import_av() -> Any:
    try:
        import av
    except ImportError as error:
        raise UserError("videos need PyAV, which is not installed: pip install 'vilseg[video]'") from error
    return av
