"""Calibration of the scores."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from vilseg.errors import DataError
from vilseg.evaluation.calibration_error import BINS, CalibrationCounts, fit_temperature
from vilseg.evaluation.image_and_mask import MaskedImage


def drawn(seed: int, pixels: int = 400) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels of 3 classes with some pixels of none, scores, and a truth with some pixels to be ignored."""
    rng = np.random.default_rng(seed)
    truth = rng.choice([0, 1, 2, 255], (4, pixels // 4)).astype(np.uint8)
    labels = np.where(rng.random(truth.shape) < 0.6, truth, rng.choice([0, 1, 2, 255], truth.shape)).astype(np.uint8)
    return labels, rng.random(truth.shape).astype(np.float32), truth


def naive(parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> float:
    """Bin by bin, pixel by pixel."""
    pixels = [
        (float(score), label == true)
        for labels, scores, truth in parts
        for label, score, true in zip(labels.ravel(), scores.ravel(), truth.ravel(), strict=True)
        if true != 255 and label < 3
    ]
    error = 0.0
    for number in range(BINS):
        own = [pixel for pixel in pixels if number == min(int(pixel[0] * BINS), BINS - 1)]
        if own:
            accuracy, confidence = (sum(one[i] for one in own) / len(own) for i in (1, 0))
            error += len(own) / len(pixels) * abs(accuracy - confidence)
    return error


def test_error_is_that_of_a_loop_over_pixels_and_parts_can_be_added() -> None:
    parts = [drawn(0), drawn(1)]
    counts, other = CalibrationCounts(3), CalibrationCounts(3)
    assert math.isnan(counts.error)
    counts.update(*parts[0], ignore=255)
    other.update(*parts[1], ignore=255)
    counts.merge(other)
    assert counts.error == pytest.approx(naive(parts), abs=1e-4)
    backwards = CalibrationCounts(3)
    for part in reversed(parts):
        backwards.update(*part, ignore=255)
    assert backwards.error == counts.error, "to the last digit, whatever the order"


def test_scores_of_certainty() -> None:
    for score, right, expected in ((1.0, True, 0.0), (1.0, False, 1.0), (0.0, False, 0.0)):
        counts = CalibrationCounts(2)
        truth = np.zeros((2, 2), np.uint8)
        counts.update(truth if right else truth + 1, np.full((2, 2), score, np.float32), truth, ignore=255)
        assert counts.error == expected


class Scores:
    """A segmenter whose scores the truth was drawn from, at a temperature."""

    def __init__(self, scores: list[Tensor]) -> None:
        self._scores = iter(scores)

    def class_scores(self, image: Any) -> Tensor:
        return next(self._scores)


class Images:
    """A dataset of masks."""

    classes = ("a", "b", "c", "d")

    def __init__(self, masks: list[np.ndarray]) -> None:
        self.masks = masks

    def __len__(self) -> int:
        return len(self.masks)

    def __iter__(self) -> Iterator[MaskedImage]:
        for number, mask in enumerate(self.masks):
            yield MaskedImage(name=str(number), image=np.zeros((*mask.shape, 3), np.uint8), mask=mask, ignore=255)


@pytest.mark.parametrize("temperature", [0.02, 0.5])
def test_the_temperature_that_scores_were_made_with_is_found(temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = [temperature * 2 * torch.randn(4, 24, 24, generator=generator) for _ in range(20)]
    masks = []
    for one in scores:
        chances = (one / temperature).softmax(0).flatten(1).T
        mask = torch.multinomial(chances, 1, generator=generator).view(24, 24).to(torch.uint8).numpy()
        mask[:3] = 255
        masks.append(mask)
    found = fit_temperature(Scores(scores), Images(masks))  # type: ignore[arg-type]
    assert found == pytest.approx(temperature, rel=0.08)


def test_nothing_to_fit_by_is_told() -> None:
    empty = Images([np.full((4, 4), 255, np.uint8)])
    with pytest.raises(DataError, match="no pixel of the dataset has a class"):
        fit_temperature(Scores([torch.zeros(4, 2, 2)]), empty)  # type: ignore[arg-type]
