import math

import numpy as np
import pytest

from vilseg.evaluation.boundary_iou import BoundaryCounts, near_contours

CLASSES = ("background", "cat", "sofa", "lamp")


def blobs(seed: int, size: tuple[int, int], values: list[int]) -> np.ndarray:
    """Rectangles of the given values over one another."""
    rng = np.random.default_rng(seed)
    labels = np.zeros(size, np.uint8)
    for _ in range(8):
        top, left = rng.integers(0, size[0]), rng.integers(0, size[1])
        labels[top : top + rng.integers(3, 16), left : left + rng.integers(3, 16)] = rng.choice(values)
    return labels


def naive_boundary(mask: np.ndarray, distance: int) -> np.ndarray:
    """Pixels of one class's mask that have a pixel of no such class, or no pixel, within the distance."""
    found = np.zeros_like(mask)
    for y, x in np.argwhere(mask):
        for j in range(y - distance, y + distance + 1):
            for i in range(x - distance, x + distance + 1):
                inside = 0 <= j < mask.shape[0] and 0 <= i < mask.shape[1]
                if not inside or not mask[j, i]:
                    found[y, x] = True
    return found


def naive_counts(prediction: np.ndarray, truth: np.ndarray, width: float) -> np.ndarray:
    distance = max(1, round(width * math.sqrt(truth.shape[0] ** 2 + truth.shape[1] ** 2)))
    known = truth != 255
    counts = np.zeros((len(CLASSES), 3), np.int64)
    for index in range(len(CLASSES)):
        true = naive_boundary((truth == index) & known, distance)
        predicted = naive_boundary((prediction == index) & known, distance)
        counts[index] = (true & predicted).sum(), true.sum(), predicted.sum()
    return counts


@pytest.mark.parametrize("width", [0.02, 0.06, 0.5])
def test_counts_agree_with_a_loop_over_classes_and_pixels(width: float) -> None:
    counted, expected = BoundaryCounts(CLASSES, width=width), np.zeros((4, 3), np.int64)
    for seed, size in enumerate([(31, 40), (40, 23), (7, 50)]):
        prediction, truth = blobs(seed, size, [0, 1, 2, 255]), blobs(seed + 100, size, [0, 1, 2, 255])
        counted.update(prediction, truth)
        expected += naive_counts(prediction, truth, width)
    np.testing.assert_array_equal(counted.counts, expected)
    assert counted.counts.dtype == np.int64
    both, true, predicted = expected.T
    np.testing.assert_allclose(counted.iou()[:3], both[:3] / (true + predicted - both)[:3])
    assert np.isnan(counted.iou()[3])  # lamp is nowhere
    assert counted.mean_iou() == pytest.approx(counted.iou()[:3].mean())
    assert counted.mean_iou([1, 3]) == counted.iou()[1]


def test_the_band_is_a_share_of_the_diagonal() -> None:
    labels = np.zeros((300, 400), np.uint8)  # diagonal 500, so 10 pixels
    labels[:, 200:] = 1
    counted = BoundaryCounts(("left", "right"))
    counted.update(labels, labels)
    inside = (300 - 20) * (200 - 20)
    np.testing.assert_array_equal(counted.counts, np.full((2, 3), 300 * 200 - inside))


def test_a_shifted_contour_costs_more_than_in_iou() -> None:
    truth, prediction = np.zeros((100, 100), np.uint8), np.zeros((100, 100), np.uint8)
    truth[20:80, 20:80] = 1
    prediction[20:80, 22:82] = 1
    counted = BoundaryCounts(("background", "cat"))
    counted.update(prediction, truth)
    mask_iou = 60 * 58 / (60 * 62)
    assert counted.iou()[1] < mask_iou - 0.2


def test_what_is_predicted_on_ignored_pixels_does_not_matter() -> None:
    truth = blobs(1, (60, 80), [0, 1, 2, 255])
    assert set(np.unique(truth)) == {0, 1, 2, 255}
    prediction = np.where(truth == 255, np.random.default_rng(0).integers(0, 4, truth.shape), truth)
    counted = BoundaryCounts(CLASSES)
    counted.update(prediction, truth)
    assert counted.mean_iou() == 1


def test_no_class_is_a_wrong_class_and_ignore_may_be_of_16_bit() -> None:
    prediction, truth = blobs(1, (40, 40), [0, 1, 255]), blobs(2, (40, 40), [0, 1, 255])
    narrow, wide = BoundaryCounts(CLASSES), BoundaryCounts(CLASSES)
    narrow.update(prediction, truth)
    spread = [np.where(labels == 255, np.uint16(65535), labels) for labels in (prediction, truth)]
    wide.update(spread[0], spread[1], ignore=65535)
    np.testing.assert_array_equal(narrow.counts, wide.counts)
    nothing = BoundaryCounts(CLASSES)
    nothing.update(np.full((40, 40), 255, np.uint8), truth)
    assert nothing.mean_iou() == 0


def test_merging_is_counting_all() -> None:
    whole, first, second = BoundaryCounts(CLASSES), BoundaryCounts(CLASSES), BoundaryCounts(CLASSES)
    for seed in range(4):
        pair = blobs(seed, (30, 40), [0, 1, 2]), blobs(seed + 9, (30, 40), [0, 1, 2])
        whole.update(*pair)
        (first if seed % 2 else second).update(*pair)
    first.merge(second)
    np.testing.assert_array_equal(first.counts, whole.counts)
    with pytest.raises(ValueError, match="cannot merge"):
        first.merge(BoundaryCounts(CLASSES, width=0.1))


def test_an_image_smaller_than_the_band_is_all_band() -> None:
    assert near_contours(np.zeros((3, 9), int), 2).all()
    assert near_contours(np.zeros((5, 5), int), 2).sum() == 24


def test_impossible_input_is_refused() -> None:
    with pytest.raises(ValueError, match="must be positive"):
        BoundaryCounts(CLASSES, width=0)
    with pytest.raises(ValueError, match="does not fit truth"):
        BoundaryCounts(CLASSES).update(np.zeros((2, 3), int), np.zeros((3, 2), int))
    with pytest.raises(ValueError, match=r"do not lie in 0\.\.3"):
        BoundaryCounts(CLASSES).update(np.zeros((2, 2), int), np.full((2, 2), 4))
