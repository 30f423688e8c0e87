import itertools
import json
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from vilseg.errors import DataError
from vilseg.evaluation.confusion_matrix import ConfusionMatrix
from vilseg.evaluation.datasets import MaskedImage
from vilseg.evaluation.evaluate import evaluate, merged
from vilseg.segmentation.result import Segmentation
from vilseg.text.vocabulary import Vocabulary

CLASSES = ("background", "cat", "sofa", "lamp")


class Scenes:
    """Images whose red channel is the mask, so that it can be known from the image alone; no "lamp" anywhere."""

    classes = CLASSES

    def __init__(self, count: int) -> None:
        rng = np.random.default_rng(0)
        self.masks = [rng.choice([0, 1, 2, 255], size=(9, 6 + n)).astype(np.uint8) for n in range(count)]

    def __len__(self) -> int:
        return len(self.masks)

    def __iter__(self) -> Iterator[MaskedImage]:
        for number, mask in enumerate(self.masks):
            image = np.stack([mask, 0 * mask, 0 * mask], axis=-1)
            yield MaskedImage(name=f"{number}", image=image, mask=mask, ignore=255)


class RedChannel:
    """Reads the mask off the image; `shift` makes it wrong everywhere."""

    def __init__(self, classes: tuple[str, ...] = CLASSES, shift: int = 0) -> None:
        self.classes = classes
        self.shift = shift
        self.batch_sizes: list[int] = []

    def batch(self, images: list[np.ndarray]) -> list[Segmentation]:
        self.batch_sizes.append(len(images))
        return [
            Segmentation(
                labels=(image[..., 0] + np.uint8(self.shift)) % np.uint8(3),
                classes=self.classes,
                scores=np.ones(image.shape[:2], np.float32),
            )
            for image in images
        ]


def test_a_right_segmenter_scores_one() -> None:
    evaluation = evaluate(RedChannel(), Scenes(3))
    assert evaluation.miou == 1
    assert evaluation.boundary_iou == 1
    assert evaluation.pixel_accuracy == 1
    assert evaluation.images == 3
    assert evaluation.examples == ()
    assert evaluation.vocabulary == evaluation.to_dict()["vocabulary"] == Vocabulary(CLASSES).digest


def test_a_wrong_segmenter_scores_zero() -> None:
    evaluation = evaluate(RedChannel(shift=1), Scenes(3))
    assert evaluation.miou == 0
    assert evaluation.boundary_iou == 0
    assert evaluation.pixel_accuracy == 0


def test_every_image_counts_once_whatever_the_batch_size() -> None:
    dataset = Scenes(7)
    segmenter, seen = RedChannel(), []
    evaluation = evaluate(segmenter, dataset, batch_size=3, progress=lambda done, total: seen.append((done, total)))
    assert segmenter.batch_sizes == [3, 3, 1]
    assert seen == [(3, 7), (6, 7), (7, 7)]
    assert evaluation.confusion.counts.sum() == sum((mask != 255).sum() for mask in dataset.masks)


def test_the_first_images_are_kept_as_examples() -> None:
    evaluation = evaluate(RedChannel(), Scenes(5), batch_size=2, keep=3)
    assert [example.truth.name for example in evaluation.examples] == ["0", "1", "2"]
    for example in evaluation.examples:
        assert example.segmentation.labels.shape == example.truth.mask.shape


class RightUpTo(RedChannel):
    """Right in the first columns of an image, as many as it was told for its place in the dataset."""

    def __init__(self, columns: list[int]) -> None:
        super().__init__()
        self.columns = columns

    def batch(self, images: list[np.ndarray]) -> list[Segmentation]:
        results = super().batch(images)
        for result in results:
            result.labels[:, self.columns.pop(0) :] = 3
        return results


def test_the_worst_images_are_kept_the_worst_first() -> None:
    evaluation = evaluate(RightUpTo([4, 1, 6, 0, 5]), Scenes(5), batch_size=2, keep_worst=3)
    assert [example.truth.name for example in evaluation.worst] == ["3", "1", "4"]
    assert [example.miou for example in evaluation.worst] == sorted(example.miou for example in evaluation.worst)
    for example in evaluation.worst:
        alone = ConfusionMatrix(CLASSES)
        alone.update(example.segmentation.labels, example.truth.mask)
        assert example.miou == alone.miou


def test_of_equally_bad_images_the_first_are_kept() -> None:
    evaluation = evaluate(RedChannel(shift=1), Scenes(5), keep_worst=2)
    assert [example.truth.name for example in evaluation.worst] == ["0", "1"]


@pytest.mark.parametrize("cuts", [(0, 7), (0, 3, 7), (0, 1, 2, 3, 4, 5, 6, 7)])
def test_parts_of_a_dataset_make_the_whole(cuts: tuple[int, ...]) -> None:
    class Part(Scenes):
        def __init__(self, start: int, stop: int) -> None:
            super().__init__(7)
            self.first, self.masks = start, self.masks[start:stop]

        def __iter__(self) -> Iterator[MaskedImage]:
            for number, item in enumerate(super().__iter__(), self.first):
                yield replace(item, name=f"{number}")

    class Half(RedChannel):  # right in some columns of every picture, so that pictures differ
        def batch(self, images: list[np.ndarray]) -> list[Segmentation]:
            found = super().batch(images)
            for segmentation in found:
                segmentation.labels[:, :3] = 1
            return found

    kept = {"keep": 4, "keep_worst": 3}
    whole = evaluate(Half(), Scenes(7), **kept)
    parts = merged((evaluate(Half(), Part(a, b), **kept) for a, b in itertools.pairwise(cuts)), **kept)
    assert parts.to_dict() == whole.to_dict()
    assert 0 < whole.miou < 1
    for mine, theirs in ((parts.examples, whole.examples), (parts.worst, whole.worst)):
        assert [example.truth.name for example in mine] == [example.truth.name for example in theirs]


def test_classes_by_other_names() -> None:
    names = ("things", "kitty", "couch", "light")
    evaluation = evaluate(RedChannel(names), Scenes(2), names=names)
    assert evaluation.per_class["kitty"] == 1
    with pytest.raises(DataError, match="3 names for 4 classes"):
        evaluate(RedChannel(names), Scenes(2), names=names[:3])


def test_the_width_of_the_band_is_told() -> None:
    figures = evaluate(RightUpTo([4, 3]), Scenes(2), boundary_width=0.1).to_dict()
    assert figures["boundary_width"] == 0.1
    assert figures["protocol"] == "all"
    assert figures["measured"] == list(CLASSES)


def test_figures_are_ready_for_json() -> None:
    figures = json.loads(json.dumps(evaluate(RedChannel(), Scenes(2)).to_dict(), allow_nan=False))
    assert figures["miou"] == 1
    assert figures["images"] == 2
    assert figures["per_class"] == {"background": 1, "cat": 1, "sofa": 1, "lamp": None}
    assert figures["boundary_per_class"] == figures["per_class"]
    assert figures["boundary_iou"] == 1
    assert np.array(figures["confusion"]).shape == (4, 5)


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (("background", "sofa", "cat", "lamp"), "class 1 is 'sofa' for the segmenter but 'cat' for the dataset"),
        (("background", "cat", "sofa"), "class 3 is '(none)' for the segmenter but 'lamp'"),
    ],
)
def test_other_classes_than_those_of_the_dataset_are_refused(classes: tuple[str, ...], message: str) -> None:
    with pytest.raises(DataError) as caught:
        evaluate(RedChannel(classes), Scenes(1))
    assert message in str(caught.value)
