"""Gallery of a bulk segmentation: a page to browse, filter and sort the images, and their thumbnails.

``gallery.html`` can be opened from a local disk or from any static web server. It loads only files relative to itself, and
its data files are scripts (``gallery/rows-0000.js``, …), because browsers do not let a page from a local disk read files in
another way. It shows thumbnails at ``thumbs/<path>.webp`` and label maps at ``masks/<path>.png``, if they exist.
"""

import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.resources import files
from itertools import islice
from typing import Any

import numpy as np
from PIL import Image

from vilseg import storage
from vilseg.errors import DataError
from vilseg.evaluation.html_page import css_colour, page
from vilseg.segmentation.visualization import class_colours, draw_overlay, rgb

PAGE, DATA, THUMBS = "gallery.html", "gallery", "thumbs"
"""Names in the output folder: the page, the folder of its data files, and the folder of the thumbnails."""

_CHUNK_ROWS = 4096
"""Number of rows per data file; small enough to be held in memory here, and to be read by a browser without a pause."""
_FRACTION_UNITS, _SCORE_UNITS = 10_000, 1_000
"""Integers in the data files that stand for an area fraction of 1 and a score of 1; the same constants are in
gallery_rows.js."""
_WEBP_QUALITY = 80
_MAX_SIDE = 8191  # px; the limit of WebP is 16383 for two images side by side


def thumbnail(image: np.ndarray, labels: np.ndarray, classes: Sequence[str], side: int = 256) -> bytes:
    """Encode a WebP with two halves of equal size: the image on the left, and the image with coloured regions on the right.

    An image larger than `side` is shrunk so that its longer side has `side` pixels; a smaller image is enlarged by the
    largest integer factor that fits. A page can show one half, both, or one over the other.

    Args:
        image: (H, W, 3) uint8 RGB.
        labels: (H, W) integers, indices into `classes`; larger values mean "no class" and are not coloured.
        classes: names in index order; they determine the colours.
        side: maximum height and width of each half in pixels, from 1 to 8191.

    Raises:
        ValueError: image and labels differ in height or width, have no pixels, or `side` is out of range.
    """
    height, width = labels.shape
    if image.shape != (height, width, 3) or not labels.size:
        raise ValueError(f"an image of shape {image.shape} does not fit labels of shape {labels.shape}")
    if not 1 <= side <= _MAX_SIDE:
        raise ValueError(f"the side of a thumbnail is 1 to {_MAX_SIDE} px, not {side}")
    photo = Image.fromarray(image)
    longest = max(height, width)
    if longest <= side:
        factor = side // longest
        regions = draw_overlay(image, labels, classes, factor=factor)
        photo = photo.resize(regions.size, Image.Resampling.NEAREST)
    else:
        rows, columns = (max(1, round(length * side / longest)) for length in (height, width))
        photo = photo.resize((columns, rows), Image.Resampling.BICUBIC, reducing_gap=2.0)
        nearest = np.ix_(_centres(height, rows), _centres(width, columns))
        regions = draw_overlay(np.asarray(photo), labels[nearest], classes)
    pair = Image.new("RGB", (2 * photo.width, photo.height))
    pair.paste(photo, (0, 0))
    pair.paste(regions, (photo.width, 0))
    buffer = io.BytesIO()
    pair.save(buffer, format="WEBP", quality=_WEBP_QUALITY)
    return buffer.getvalue()


def _centres(length: int, count: int) -> np.ndarray:
    """Return, for `count` equal intervals of `length` pixels, the index of the pixel at the centre of each."""
    return ((np.arange(count) + 0.5) * length / count).astype(np.int64)


def write_gallery(
    out_uri: str, rows: Iterable[Mapping[str, Any]], classes: Sequence[str], *, title: str = "Segmented pictures"
) -> None:
    """Write ``gallery.html`` and its data files to the output folder; an existing gallery is replaced.

    Rows are processed a few thousand at a time, so memory is bounded. The page itself is written last, so that its data is
    complete if the page exists.

    Args:
        out_uri: path or ``s3://`` URI of the output folder, which contains, or will contain, ``thumbs/`` and ``masks/``.
        rows: rows of ``results.parquet``, preferably sorted by path. The columns ``path``, ``width``, ``height``, ``status``,
            ``error``, ``classes``, ``areas`` and ``scores`` are used; others are ignored.
        classes: names of all classes, in index order.
        title: heading of the page.

    Raises:
        DataError: a row has a class that is not in `classes`, or an impossible area or score.
        StorageError: the output folder cannot be written.
    """
    data = storage.join(out_uri, DATA)
    for old in (storage.join(out_uri, PAGE), data):
        storage.delete(old)
    index = {name: number for number, name in enumerate(classes)}
    counts = {"rows": 0, "regions": 0, "chunks": 0}
    for chunk in _chunks(rows):
        columns = _columns(chunk, index)
        target = storage.join(data, f"rows-{counts['chunks']:04d}.js")
        storage.write_text(target, f"addRows({json.dumps(columns, ensure_ascii=False, separators=(',', ':'))});\n")
        counts["rows"] += len(chunk)
        counts["regions"] += sum(max(count, 0) for count in columns["counts"])
        counts["chunks"] += 1
    colours = [css_colour(rgb(colour)) for colour in class_colours(classes)]
    about = {**counts, "folder": DATA, "classes": list(classes), "colours": colours}
    storage.write_text(storage.join(out_uri, PAGE), page(title, _parts(about)))


def _chunks(rows: Iterable[Mapping[str, Any]]) -> Iterator[list[Mapping[str, Any]]]:
    remaining = iter(rows)
    while chunk := list(islice(remaining, _CHUNK_ROWS)):
        yield chunk


def _columns(rows: Sequence[Mapping[str, Any]], index: Mapping[str, int]) -> dict[str, Any]:
    """Convert rows to the columns of a data file.

    ``paths``: path of every row. ``sizes``: width and height of every row, alternating. ``counts``: number of regions of every
    row, -1 if it was rejected. ``regions``: class index, area fraction and score of every region, in turn. ``errors``: reason
    of every rejected row.
    """
    paths: list[str] = []
    sizes: list[int] = []
    counts: list[int] = []
    regions: list[int] = []
    errors: list[str] = []
    for row in rows:
        paths.append(_utf8(row["path"]))
        sizes += (row.get("width") or 0, row.get("height") or 0)
        if row["status"] == "ok":
            triples = _regions(row, index)
            counts.append(len(triples))
            regions += [number for triple in triples for number in triple]
        else:
            counts.append(-1)
            errors.append(_utf8(row.get("error") or ""))
    return {"paths": paths, "sizes": sizes, "counts": counts, "regions": regions, "errors": errors}


def _regions(row: Mapping[str, Any], index: Mapping[str, int]) -> list[tuple[int, int, int]]:
    """Return (class index, area fraction, score) of every region, the largest first, as integers in their units."""
    pixels = (row.get("width") or 0) * (row.get("height") or 0)
    found = []
    for name, area, score in zip(row["classes"], row["areas"], row["scores"], strict=True):
        if name not in index:
            raise DataError(
                f"the row of {row['path']} names the class {name!r}, which is not in the class list; "
                "give the list that the pictures were segmented with"
            )
        if not 0 < area <= pixels or not 0 <= score <= 1:
            raise DataError(
                f"the row of {row['path']} has {name!r} with {area} of {pixels} pixels and a score of {score}; "
                "an area lies within the picture and a score in 0..1, so segment this picture again"
            )
        # An existing region is never rounded to zero.
        share = max(1, round(area / pixels * _FRACTION_UNITS))
        found.append((index[name], share, round(score * _SCORE_UNITS)))
    return sorted(found, key=lambda region: -region[1])


def _utf8(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{text!r} is not Unicode text; rename the file to a name in UTF-8") from error
    return text


def _parts(about: Mapping[str, Any]) -> list[str]:
    """Return the HTML of the page below its heading. "<" is escaped in JSON, because a class name may contain "</script>"."""

    def own(name: str) -> str:
        return files(__package__).joinpath(name).read_text("utf-8")

    script = "\n".join(own(f"gallery_{part}.js") for part in ("rows", "shared", "large", "view"))
    described = json.dumps(about, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    return [
        f"<style>\n{own('gallery.css')}</style>",
        own("gallery.html"),
        f'<script type="application/json" id="about">{described}</script>',
        f"<script>\n{script}</script>",
    ]
