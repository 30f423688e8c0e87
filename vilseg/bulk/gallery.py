"""Gallery of a bulk segmentation: a page to browse, filter and sort the images, and their thumbnails.

``gallery.html`` works by double click from a disk as well as from any static web server: it loads only files next
to it, and its rows are scripts (``gallery/rows-0000.js``, …), because browsers allow a page from a disk to read files
in no other way. Thumbnails are expected at ``thumbs/<path>.webp`` and label maps at ``masks/<path>.png``; missing ones
are left out.
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
"""Names below the output: the page, and the folders of its rows and of the thumbnails."""

_CHUNK_ROWS = 4096
"""Rows per data file: held in memory here, and read by a browser without a noticeable pause."""
_FRACTION_UNITS, _SCORE_UNITS = 10_000, 1_000
"""Units of area fractions and scores, which are integers in the data files; gallery_rows.js has the same constants."""
_WEBP_QUALITY = 80
_MAX_SIDE = 8191  # px: WebP ends at 16383, and two images lie side by side


def thumbnail(image: np.ndarray, labels: np.ndarray, classes: Sequence[str], side: int = 256) -> bytes:
    """Encode the image and, to its right, the same image with coloured regions, as one WebP.

    Each half has the image's shape and a longer side of `side` px; an image that is smaller is enlarged by the largest
    whole factor that fits. The halves have the same size, so that a page can show one, both, or one over the other.

    Args:
        image: (H, W, 3) uint8 RGB.
        labels: (H, W) integers, index into `classes`; anything larger is no class and stays untinted.
        classes: names in index order; they decide the colours.
        side: px, from 1 to 8191.

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
    """Indices of the pixels under the centres of `count` larger ones."""
    return ((np.arange(count) + 0.5) * length / count).astype(np.int64)


def write_gallery(
    out_uri: str, rows: Iterable[Mapping[str, Any]], classes: Sequence[str], *, title: str = "Segmented pictures"
) -> None:
    """Write ``gallery.html`` and its data files below `out_uri`; an existing gallery is replaced.

    Rows are processed a few thousand at a time, so memory is bounded. The page itself is written last: if it exists,
    its data is complete.

    Args:
        out_uri: folder or ``s3://`` URI that holds, or will hold, ``thumbs/`` and ``masks/``.
        rows: rows of ``results.parquet`` (``path``, ``width``, ``height``, ``status``, ``error``, ``classes``, ``areas``,
            ``scores``; other columns are ignored and optional), preferably sorted by path.
        classes: all names, in index order.
        title: heading of the page.

    Raises:
        DataError: a row names another class, or its numbers are impossible.
        StorageError: the location cannot be written.
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
    """Convert rows to the columns that the page reads.

    ``paths``; ``sizes``: width and height of every row; ``counts``: regions of every row, -1 for a rejected one;
    ``regions``: class, area fraction and score of every region; ``errors``: the sentence of every rejected row.
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
    """Class, area fraction and score of every region, the largest first, as integers in their units."""
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
        # A region that exists is never rounded to nothing.
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
    """HTML parts of the page below its heading. "<" is escaped in JSON, since a class name may hold "</script>"."""

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
