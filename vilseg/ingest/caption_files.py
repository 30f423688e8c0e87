"""Reader of caption files (CSV, JSONL, JSON records, COCO captions), which returns uniform rows.

Columns are found by name, ignoring case; configured names take precedence over common ones.
"""

from __future__ import annotations

import ast
import csv
import io
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from vilseg import storage
from vilseg.config.data import ColumnsConfig
from vilseg.data.shards import BadPair
from vilseg.errors import DataError

CSV_SUFFIXES = (".csv", ".tsv", ".txt")
JSON_LINES_SUFFIXES = (".jsonl", ".ndjson")
JSON_SUFFIX = ".json"

_IMAGE_NAMES = (
    *("image", "jpg", "jpeg", "png", "webp"),
    *("image_path", "path", "file", "filename", "file_name", "filepath", "image_name"),
)
_CAPTION_NAMES = ("text", "sentences", "sentence", "description", "comment")
"""Columns tried in this order if there is neither ``caption`` nor ``captions``."""
_ALT_NAMES = ("alt", "alt_text", "alttext", "alt-text")
_TAG_NAMES = ("tags", "hashtags", "keywords")
_DELIMITERS = (",", "\t", ";", "|")


@dataclass(frozen=True, slots=True)
class Row:
    """Row of a caption file, for one image."""

    where: str
    """Position of the row for error messages: ``captions.csv:12``."""
    image: str
    """Image as written in the file: a URI, or a path that may be relative to different folders (see `ImageFinder`)."""
    metadata: dict[str, Any]
    """Fields ``captions``, ``alt`` and ``tags`` as :func:`normalise` returns them, and all other fields of the row."""


def read_rows(uri: str, columns: ColumnsConfig) -> Iterator[Row | BadPair]:
    """Yield the rows of a caption file in order; yield a :class:`BadPair` for an invalid row.

    Raises:
        DataError: the file is not CSV with an image column, JSONL, a JSON list of objects, or COCO captions.
        StorageError: the file cannot be read.
    """
    lower = uri.lower()
    text = storage.read_text(uri)
    if lower.endswith(CSV_SUFFIXES):
        return _rows_of(uri, _csv_records(uri, text, columns), columns)
    if lower.endswith(JSON_LINES_SUFFIXES):
        return _rows_of(uri, _json_lines(uri, text), columns)
    return _json_rows(uri, text, columns)


def split_image(values: Mapping[str, Any], columns: ColumnsConfig) -> tuple[Any, dict[str, Any]]:
    """Split a record into the value of its image field (a path, bytes or other value; None if absent) and the other fields."""
    rest = dict(values)
    found = _take(rest, columns.image, columns.path, *_IMAGE_NAMES)
    return found, rest


def normalise(values: Mapping[str, Any], columns: ColumnsConfig) -> dict[str, Any]:
    """Convert the fields of a record to the metadata of a pair.

    The metadata have the keys ``captions`` (list), ``alt`` (text) and ``tags`` (list, without "#"), each if the record has such a
    field under a name in ``columns`` or a common name. Other fields are kept. Values that JSON cannot represent are converted:
    bytes to null, other values to text.
    """
    rest = dict(values)
    captions = [*_texts(_take(rest, columns.captions, "captions")), *_texts(_take(rest, columns.caption, "caption"))]
    captions = captions or _texts(_take(rest, *_CAPTION_NAMES))
    alt = _texts(_take(rest, *_ALT_NAMES))
    tags = [tag for name in _TAG_NAMES for tag in _tags(_take(rest, name))]
    metadata: dict[str, Any] = {}
    if captions:
        metadata["captions"] = list(dict.fromkeys(captions))
    if alt:
        metadata["alt"] = " ".join(alt)
    if tags:
        metadata["tags"] = list(dict.fromkeys(tags))
    others = {name: value for name, value in rest.items() if name not in metadata and not _is_missing(value)}
    return {
        **metadata,
        **json.loads(json.dumps(others, default=lambda value: None if isinstance(value, bytes) else str(value))),
    }


def merge(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Merge the metadata of one image from two rows.

    Captions and tags of both are kept. If both have another field, the value in ``first`` is kept.
    """
    merged = {**second, **first}
    for name in ("captions", "tags"):
        if name in merged:
            merged[name] = list(dict.fromkeys([*first.get(name, []), *second.get(name, [])]))
    return merged


def _rows_of(
    uri: str, records: Iterator[tuple[int, dict[str, Any] | str]], columns: ColumnsConfig
) -> Iterator[Row | BadPair]:
    for line, record in records:
        where = f"{storage.name(uri)}:{line}"
        if isinstance(record, str):
            yield BadPair(where, record)
            continue
        image, rest = split_image(record, columns)
        if isinstance(image, str) and image.strip():
            yield Row(where, image.strip(), normalise(rest, columns))
        else:
            yield BadPair(where, f"it names no image (looked for {', '.join(_image_names(columns))})")


def _csv_records(uri: str, text: str, columns: ColumnsConfig) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Yield (line, fields by column) or (line, problem), starting after the header."""
    delimiter, header = _header(uri, text, columns)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
    try:
        next(reader)
        for values in reader:
            if len(values) > len(header):
                # An error, because truncating the row would silently cut the caption.
                problem = f"it has {len(values)} fields where the header has {len(header)}"
                yield reader.line_num, f"{problem}; put quotes around captions that hold '{delimiter}'"
            elif values:
                yield reader.line_num, dict(zip(header, (value.strip() for value in values), strict=False))
    except csv.Error as error:
        raise DataError(f"{uri}, line {reader.line_num}: {error}; a quote may be missing there") from error


def _header(uri: str, text: str, columns: ColumnsConfig) -> tuple[str, list[str]]:
    """Return the first delimiter that splits the first line into columns one of which is an image column, and the columns."""
    line = text.partition("\n")[0].strip("\r")
    names = _image_names(columns)
    for delimiter in _DELIMITERS:
        header = [name.strip() for name in next(csv.reader([line], delimiter=delimiter, skipinitialspace=True), [])]
        if not {name.lower() for name in header}.isdisjoint(names):
            return delimiter, header
    raise DataError(f"{uri}: no column of its first line, '{line[:80]}', names the image; call one {', '.join(names)}")


def _json_lines(uri: str, text: str) -> Iterator[tuple[int, dict[str, Any] | str]]:
    seen_object = False
    # Not splitlines, because JSON strings may contain other line separators.
    for line, content in enumerate(text.split("\n"), start=1):
        if not content.strip():
            continue
        try:
            record = json.loads(content)
        except (ValueError, RecursionError) as error:
            record, problem = None, f"it is not JSON: {error}"
        else:
            problem = "it is not a JSON object"
        if isinstance(record, dict):
            seen_object = True
            yield line, record
        elif seen_object:
            yield line, problem
        else:
            raise DataError(
                f"{uri}, line {line}: {problem}; a JSONL file has an object with image and caption on each line"
            )


def _json_rows(uri: str, text: str, columns: ColumnsConfig) -> Iterator[Row | BadPair]:
    # Checked before parsing, because other COCO annotations are large and slow to parse.
    if '"annotations"' in text and '"caption"' not in text:
        raise DataError(f"{uri} holds no captions")
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        if text.lstrip().startswith("{") and "\n{" in text:  # JSONL in a file named .json
            return _rows_of(uri, _json_lines(uri, text), columns)
        raise DataError(f"{uri} is not JSON: {error}") from error
    if isinstance(content, dict) and all(isinstance(content.get(part), list) for part in ("images", "annotations")):
        return _coco_rows(uri, content)
    if isinstance(content, list) and all(isinstance(record, dict) for record in content):
        return _rows_of(uri, iter(enumerate(content)), columns)
    raise DataError(
        f"{uri} is neither COCO captions ('images' and 'annotations') nor a list of objects with image and caption"
    )


def _coco_rows(uri: str, content: dict[str, list]) -> Iterator[Row | BadPair]:
    captions: dict[Any, list[str]] = {}
    for annotation in content["annotations"]:
        if isinstance(annotation, dict) and isinstance(annotation.get("caption"), str):
            captions.setdefault(annotation.get("image_id"), []).append(annotation["caption"].strip())
    for image in content["images"]:
        if isinstance(image, dict) and isinstance(image.get("file_name"), str):
            found = [caption for caption in captions.pop(image.get("id"), []) if caption]
            if found:
                others = {name: value for name, value in image.items() if name not in ("file_name", "captions")}
                yield Row(f"{storage.name(uri)}:{image.get('id')}", image["file_name"], {"captions": found, **others})
    for image_id in captions:
        yield BadPair(f"{storage.name(uri)}:{image_id}", "'images' has no entry with this id and a file_name")


def _image_names(columns: ColumnsConfig) -> tuple[str, ...]:
    return tuple(dict.fromkeys((columns.image.lower(), columns.path.lower(), *_IMAGE_NAMES)))


def _take(values: dict[str, Any], *wanted: str) -> Any:
    """Remove the first of the ``wanted`` fields that has a value, ignoring case, and return the value; None if there is none."""
    names = {str(name).strip().lower(): name for name, value in values.items() if not _is_missing(value)}
    name = next((names[one.lower()] for one in wanted if one.lower() in names), None)
    return None if name is None else values.pop(name)


def _is_missing(value: Any) -> bool:
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def _texts(value: Any) -> list[str]:
    """Return the texts of a field, which may be a text, a list, or a text that contains a list in Python syntax."""
    if isinstance(value, str) and value.startswith("[") and value.endswith("]"):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return [value]  # a caption in brackets, not a list
    items = value if isinstance(value, list) else [value]
    return [item.strip() for item in items if isinstance(item, str) and item.strip()]


def _tags(value: Any) -> list[str]:
    texts = _texts(value)
    if len(texts) == 1 and not isinstance(value, list):
        # "#sea #sunset", or "sea, old town"
        texts = re.split(r"[\s,;]+" if "#" in texts[0] else r"[,;|]", texts[0])
    return [tag for text in texts if (tag := text.strip().lstrip("#").strip())]
