"""``annotations.json`` of a bulk segmentation: COCO instance annotations and panoptic segments, written row by row."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import IO, Any

from pycocotools import mask as coco_mask

Row = Mapping[str, Any]


def write_coco(
    file: IO[bytes], rows: Callable[[], Iterable[Row]], classes: Sequence[str], mask_name: Callable[[Row], str] | None
) -> None:
    """Write a JSON file with the sections ``images``, ``categories``, ``annotations`` and, if there are mask files, ``panoptic``.

    The id of a category is the index of its class plus 1, because COCO reserves 0 for "no category". The id of a segment is
    its pixel value in the mask file, as in COCO's panoptic format, which is the class index: always ``category_id`` - 1.

    Args:
        file: binary file to write to.
        rows: function that returns a new iterator over the rows of the results table; called once per section.
        classes: class names in index order.
        mask_name: function that returns the path of a row's mask file relative to the output folder; None if there are no
            mask files.
    """
    index = {name: number for number, name in enumerate(classes)}
    categories = [{"id": number + 1, "name": name, "supercategory": ""} for name, number in index.items()]
    sections: dict[str, Iterator[dict[str, Any]]] = {
        "images": (_image(image_id, row) for image_id, row in enumerate(rows(), 1)),
        "categories": iter(categories),
        "annotations": _annotations(rows(), index),
    }
    if mask_name:
        sections["panoptic"] = (
            {"image_id": image_id, "file_name": mask_name(row), "segments_info": [*_segments(row, index)]}
            for image_id, row in enumerate(rows(), 1)
        )
    for number, (name, items) in enumerate(sections.items()):
        file.write(f"{',' if number else '{'}\n{json.dumps(name)}: [".encode())
        for place, item in enumerate(items):
            file.write((",\n" if place else "\n").encode() + json.dumps(item, ensure_ascii=False).encode())
        file.write(b"]")
    file.write(b"}\n")


def _image(image_id: int, row: Row) -> dict[str, Any]:
    return {"id": image_id, "file_name": row["path"], "width": row["width"], "height": row["height"]}


def _regions(row: Row, index: Mapping[str, int]) -> Iterator[tuple[int, float, dict[str, Any], dict[str, Any]]]:
    """Yield (class index, score, run-length code, fields common to both formats) of each class in the image."""
    for name, area, score, counts in zip(row["classes"], row["areas"], row["scores"], row["rle"], strict=True):
        rle = {"size": [row["height"], row["width"]], "counts": counts}
        bbox = [int(side) for side in coco_mask.toBbox(rle)]
        yield index[name], score, rle, {"category_id": index[name] + 1, "area": area, "bbox": bbox, "iscrowd": 0}


def _segments(row: Row, index: Mapping[str, int]) -> Iterator[dict[str, Any]]:
    for number, _, _, region in _regions(row, index):
        yield {"id": number, **region}


def _annotations(rows: Iterable[Row], index: Mapping[str, int]) -> Iterator[dict[str, Any]]:
    annotation_id = 0
    for image_id, row in enumerate(rows, 1):
        for _, score, rle, region in _regions(row, index):
            annotation_id += 1
            yield {
                "id": annotation_id,
                "image_id": image_id,
                **region,
                "segmentation": rle,
                "score": round(score, 4),
            }
