from pathlib import Path

import numpy as np
import pytest

from tests.unit import benchmark_dataset_trees as trees
from vilseg.errors import DataError
from vilseg.evaluation.datasets import open_dataset
from vilseg.evaluation.evaluate import evaluate
from vilseg.evaluation.protocols import EvaluationProtocol, under
from vilseg.segmentation.result import Segmentation


class Constant:
    """Gives every pixel of every image the same labels."""

    def __init__(self, classes: tuple[str, ...], labels: np.ndarray) -> None:
        self.classes = classes
        self.labels = labels

    def batch(self, images: list[np.ndarray]) -> list[Segmentation]:
        scores = np.ones(trees.SIZE, np.float32)
        return [Segmentation(labels=self.labels, classes=self.classes, scores=scores) for _ in images]


def test_all_classes_are_asked_for_and_measured(tmp_path: Path) -> None:
    trees.voc(tmp_path)
    data = open_dataset(f"voc:{tmp_path}")
    viewed, measured = under(data, EvaluationProtocol.ALL)
    assert viewed is data
    assert measured == tuple(range(21))


def test_without_background_its_pixels_count_for_nothing(tmp_path: Path) -> None:
    trees.voc(tmp_path)
    data = open_dataset(f"voc:{tmp_path}")
    viewed, measured = under(data, EvaluationProtocol.NO_BACKGROUND)
    assert viewed.classes == data.classes[1:]
    assert measured == tuple(range(20))
    assert len(viewed) == len(data)
    for before, after in zip(data, viewed, strict=True):
        named = np.where(before.mask == 255, "-", np.take(data.classes, np.minimum(before.mask, 20)))
        named[named == "background"] = "-"
        np.testing.assert_array_equal(
            named, np.where(after.mask == after.ignore, "-", np.take(viewed.classes, np.minimum(after.mask, 19)))
        )


def test_background_may_stand_anywhere(tmp_path: Path) -> None:
    mask = np.tile(np.array([0, 1, 2, 65535] * 4, np.uint16), (12, 1))
    trees.write(
        tmp_path,
        {"images/a.jpg": trees.jpeg(), "masks/a.png": trees.png(mask), "classes.txt": b"cat\nbackground\nsofa\n"},
    )
    (item,) = under(open_dataset(f"folder:{tmp_path}"), EvaluationProtocol.NO_BACKGROUND)[0]
    np.testing.assert_array_equal(item.mask[0], [0, 65535, 1, 65535] * 4)
    assert item.mask.dtype == np.uint16


def test_unseen_figures_are_means_over_the_unseen_classes_among_all(tmp_path: Path) -> None:
    trees.voc(tmp_path)
    data = open_dataset(f"voc:{tmp_path}")
    # Over 0, ignore, person, ignore in the first image and 0, train, potted plant, monitor in the second one.
    labels = trees.stripes(0, 19, 19, 20)
    found = evaluate(Constant(data.classes, labels), data, protocol=EvaluationProtocol.UNSEEN)
    assert found.measured_classes == ("potted plant", "sheep", "sofa", "train", "tv monitor")
    # Train is also said of the person and of the plant, a stripe each; sheep and sofa are nowhere.
    assert found.per_class["train"] == pytest.approx(1 / 3)
    assert found.miou == pytest.approx(np.mean([0, 1 / 3, 1]))
    assert found.pixel_accuracy == pytest.approx(2 / 3)
    whole = evaluate(Constant(data.classes, labels), data)
    assert whole.miou == pytest.approx(np.mean([1, 0, 0, 1 / 3, 1]))
    np.testing.assert_array_equal(whole.confusion.counts, found.confusion.counts)
    figures = found.to_dict()
    assert figures["protocol"] == "unseen"
    assert figures["measured"] == list(found.measured_classes)
    assert figures["boundary_iou"] == found.boundary_iou != whole.boundary_iou


def test_datasets_without_unseen_classes_or_background(tmp_path: Path) -> None:
    trees.ade20k(tmp_path)
    data = open_dataset(f"ade20k:{tmp_path}")
    with pytest.raises(DataError, match="which are voc, context, coco-stuff; use the protocol all"):
        under(data, EvaluationProtocol.UNSEEN)
    with pytest.raises(DataError, match="none of the 150 classes is called so; use the protocol all"):
        under(data, EvaluationProtocol.NO_BACKGROUND)
