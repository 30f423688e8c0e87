"""Read and write video files, as upright frames with their times, by PyAV (the extra ``video``)."""

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
"""Default limit of width x height, as for images: a damaged header may announce anything."""

_FORMATS = (
    "mov,matroska,avi,mpegts,mpeg,mpegvideo,m4v,h264,hevc,av1,obu,ivf,flv,live_flv,asf,ogg,gif,apng,webp_anim,mxf,mxf_opatom,"
    "gxf,nut,nsv,dv,rm,wtv,wav,mp3,flac,yuv4mpegpipe,mjpeg,vc1,dhav,3gp,swf,smk,bink,cavsvideo,dirac,film_cpk"
)
"""Demuxers for videos. None that refers to other files or addresses, as play lists do: uploads are not trusted."""

_FORMATS_WITH_DURATION = ("mov,mp4", "matroska", "avi")
"""Formats whose header states the duration of the video; elsewhere FFmpeg guesses it."""

_ENCODERS = {"libx264": {"crf": "20", "preset": "veryfast"}, "mpeg4": {"qmin": "2", "qmax": "6"}}
"""Encoders with their settings: H.264 where PyAV's FFmpeg was built with it, MPEG-4 part 2 otherwise; both keep edges
sharp."""

_TICKS_PER_SECOND = 60_000
"""Ticks per second of written videos: whole ticks for the usual frame rates, and MPEG-4 allows no more than 65535."""


@dataclass(frozen=True, eq=False)
class Frame:
    """One frame of a video."""

    index: int
    """From 0, in the order shown."""
    seconds: float
    """Time at which it is shown, from the first frame on; frames of a variable rate keep their own times."""
    image: np.ndarray
    """(H, W, 3) uint8 RGB, upright."""


def read_frames(path: str | Path, *, max_pixels: int | None = None) -> Iterator[Frame]:
    """Yield the frames of the first video stream of a file, decoded on demand.

    Rotation noted by the camera is applied, in quarter turns. If the size changes on the way, frames are resized to
    the size of the first. Pixels that are not square stay as they are stored.

    Args:
        path: a path or URI; an object of a store is copied to a temporary file first.
        max_pixels: largest width x height of the frames; 100 million where None.

    Raises:
        TooLargeError: the frames have more pixels.
        DataError: not a video, no video stream, no frame, or damaged or cut short; all good frames come before that.
        StorageError: it cannot be read.
        UserError: PyAV is not installed.
    """
    av = _import_av()
    uri = str(path)
    with storage.local_copy(uri) as local:
        storage.open_input(str(local)).close()  # a directory, or no permission: a better message than that of FFmpeg
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
        if frame.width * frame.height > limit:  # the header may not announce it
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
    """Duration of the video by its header, in seconds; None where it is not stated."""
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
    """Write frames as an MP4 file with H.264 (MPEG-4 part 2 where PyAV has none), each shown from its own time on.

    Both sides must be even there, so an odd one is made longer by a repeated row or column. The file appears complete
    or not at all, also when ``frames`` raises.

    Raises:
        DataError: there is no frame, or one differs in size from the first.
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
