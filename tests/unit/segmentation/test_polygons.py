"""Outlines of regions, opened by the programs that people have for them."""

import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from pycocotools.coco import COCO

from vilseg.segmentation.polygons import polygons
from vilseg.segmentation.result import Segmentation

FINER = 8
"""Pillow fills every pixel that an outline touches; drawn finer, the middles of pixels count."""


def random_image() -> Segmentation:
    """A disc, a ring and two bars on a ground of another class."""
    y, x = np.mgrid[:90, :120]
    labels = np.zeros((90, 120), np.uint8)
    labels[(y - 30) ** 2 + (x - 30) ** 2 < 20**2] = 1
    distance = (y - 50) ** 2 + (x - 85) ** 2
    labels[(distance < 30**2) & (distance > 12**2)] = 2
    labels[75:85, 5:25] = labels[75:85, 30:50] = 3
    return Segmentation(
        labels=labels, classes=("ground", "disc", "ring", "bars"), scores=np.ones(labels.shape, np.float32)
    )


def overlap(one: np.ndarray, other: np.ndarray) -> float:
    return float((one & other).sum() / (one | other).sum())


def test_pillow_draws_the_regions_from_their_polygons() -> None:
    result = random_image()
    for region in result.regions:
        canvas = Image.new("1", (FINER * 120, FINER * 90))
        for outline, *holes in polygons(region.rle):
            for ring, inside in ((outline, 1), *((hole, 0) for hole in holes)):
                ImageDraw.Draw(canvas).polygon([(FINER * x, FINER * y) for x, y in ring], fill=inside)
        drawn = np.asarray(canvas)[FINER // 2 :: FINER, FINER // 2 :: FINER]
        mask = result.labels == result.classes.index(region.class_name)
        assert overlap(drawn, mask) > 0.97, region.class_name


def test_pycocotools_reads_a_file_whose_regions_are_polygons(tmp_path: Path) -> None:
    result = random_image()
    document = {"info": {}, **result.to_coco()}
    for annotation in document["annotations"]:  # of COCO's polygons none is a hole
        annotation["segmentation"] = [np.ravel(ring).tolist() for ring, *_ in polygons(annotation["segmentation"])]
    (tmp_path / "polygons.json").write_text(json.dumps(document))
    coco = COCO(str(tmp_path / "polygons.json"))
    for name, parts in (("disc", 1), ("bars", 2)):
        [category] = coco.getCatIds(catNms=[name])
        [annotation] = coco.loadAnns(coco.getAnnIds(catIds=[category]))
        assert len(annotation["segmentation"]) == parts
        assert overlap(coco.annToMask(annotation).astype(bool), result.labels == result.classes.index(name)) > 0.97
