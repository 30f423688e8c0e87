import math

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import multiclass_confusion_matrix, multiclass_jaccard_index

from vilseg.evaluation.confusion_matrix import ConfusionMatrix

CLASSES = ("background", "cat", "sofa", "lamp")


def random_pair(seed: int, ignore: int = 255) -> tuple[np.ndarray, np.ndarray]:
    """Prediction with "no class" here and there, truth with pixels to ignore."""
    rng = np.random.default_rng(seed)
    prediction = rng.choice([0, 1, 2, 3, 255], size=(13, 17)).astype(np.uint8)
    truth = rng.choice([0, 1, 2, 3, ignore], size=(13, 17)).astype(np.uint16 if ignore > 255 else np.uint8)
    return prediction, truth


def test_counts_agree_with_a_loop_over_pixels() -> None:
    matrix = ConfusionMatrix(CLASSES)
    expected = np.zeros((4, 5), dtype=np.int64)
    for seed in range(3):
        prediction, truth = random_pair(seed)
        matrix.update(prediction, truth)
        for predicted, true in zip(prediction.ravel(), truth.ravel(), strict=True):
            if true != 255:
                expected[true, min(predicted, 4)] += 1
    np.testing.assert_array_equal(matrix.counts, expected)
    assert matrix.counts.dtype == np.int64


def test_figures_agree_with_torchmetrics() -> None:
    matrix = ConfusionMatrix(CLASSES)
    pairs = [random_pair(seed) for seed in range(3)]
    for prediction, truth in pairs:
        matrix.update(prediction, truth)
    predictions = torch.from_numpy(np.stack([pair[0] for pair in pairs]).astype(np.int64)).clamp(max=4)
    truths = torch.from_numpy(np.stack([pair[1] for pair in pairs]).astype(np.int64))

    # For torchmetrics "no class" is a fifth class, which no pixel truly has.
    counts = multiclass_confusion_matrix(predictions, truths, num_classes=5, ignore_index=255)
    np.testing.assert_array_equal(matrix.counts, counts[:4].numpy())
    iou = multiclass_jaccard_index(predictions, truths, num_classes=5, ignore_index=255, average="none")[:4]
    np.testing.assert_allclose(matrix.iou(), iou.numpy(), rtol=1e-6)
    assert matrix.miou == pytest.approx(float(iou.mean()), rel=1e-6)
    known = truths != 255
    assert matrix.pixel_accuracy == pytest.approx(float((predictions == truths)[known].float().mean()), rel=1e-6)


def test_means_over_some_classes_agree_with_torchmetrics() -> None:
    matrix = ConfusionMatrix(CLASSES)
    prediction, truth = random_pair(0)
    matrix.update(prediction, truth)
    predictions = torch.from_numpy(prediction.astype(np.int64)).clamp(max=4)
    truths = torch.from_numpy(truth.astype(np.int64))
    iou = multiclass_jaccard_index(predictions, truths, num_classes=5, ignore_index=255, average="none")
    assert matrix.mean_iou([1, 3]) == pytest.approx(float(iou[[1, 3]].mean()), rel=1e-6)
    measured = (truths == 1) | (truths == 3)
    assert matrix.accuracy([1, 3]) == pytest.approx(float((predictions == truths)[measured].float().mean()), rel=1e-6)
    assert math.isnan(matrix.mean_iou([]))
    assert math.isnan(matrix.accuracy([]))


def test_iou_is_intersection_over_union() -> None:
    matrix = ConfusionMatrix(("a", "b"))
    matrix.update(np.array([[0, 0, 1, 255]]), np.array([[0, 1, 1, 1]]))
    np.testing.assert_allclose(matrix.iou(), [1 / 2, 1 / 3])
    assert matrix.pixel_accuracy == 2 / 4


def test_mean_is_over_the_classes_in_the_truth() -> None:
    matrix = ConfusionMatrix(CLASSES)
    matrix.update(np.array([[0, 0, 2, 1]]), np.array([[0, 0, 1, 1]]))
    np.testing.assert_array_equal(matrix.iou(), [1.0, 0.5, 0.0, np.nan])  # sofa is predicted only, lamp is nowhere
    assert matrix.miou == 0.75


def test_nothing_counted_is_not_zero() -> None:
    matrix = ConfusionMatrix(CLASSES)
    matrix.update(np.zeros((2, 2), np.uint8), np.full((2, 2), 255, np.uint8))
    assert math.isnan(matrix.miou)
    assert math.isnan(matrix.pixel_accuracy)
    assert np.isnan(matrix.iou()).all()


def test_ignore_value_can_differ_from_image_to_image() -> None:
    matrix = ConfusionMatrix(CLASSES)
    prediction, truth = random_pair(0)
    matrix.update(prediction, truth)
    wide = np.where(truth == 255, np.uint16(65535), truth)
    other = ConfusionMatrix(CLASSES)
    other.update(prediction, wide, ignore=65535)
    np.testing.assert_array_equal(matrix.counts, other.counts)


def test_merging_is_counting_all() -> None:
    whole, first, second = ConfusionMatrix(CLASSES), ConfusionMatrix(CLASSES), ConfusionMatrix(CLASSES)
    for seed in range(4):
        pair = random_pair(seed)
        whole.update(*pair)
        (first if seed % 2 else second).update(*pair)
    first.merge(second)
    np.testing.assert_array_equal(first.counts, whole.counts)


def test_merging_other_classes_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot merge"):
        ConfusionMatrix(("a", "b")).merge(ConfusionMatrix(("b", "a")))


@pytest.mark.parametrize(
    ("prediction", "truth", "message"),
    [
        (np.zeros((2, 3), int), np.zeros((3, 2), int), "does not fit truth"),
        (np.zeros((2, 2), int), np.full((2, 2), 4), "do not lie in 0..3"),
        (np.zeros((2, 2), int), np.full((2, 2), -1), "do not lie in 0..3"),
        (np.full((2, 2), -1), np.zeros((2, 2), int), "negative"),
    ],
)
def test_impossible_values_are_refused(prediction: np.ndarray, truth: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConfusionMatrix(CLASSES).update(prediction, truth)
