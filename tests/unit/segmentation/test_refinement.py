"""Scores follow the edges of the image."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from vilseg.config import RefinementConfig, SegmentationConfig
from vilseg.model import ViLSeg
from vilseg.segmentation.refinement import refine
from vilseg.segmentation.segmenter import Segmenter


def naive(scores_CHW: Tensor, image_3HW: Tensor, iterations: int, dilations: list[int], tolerance: float) -> Tensor:
    """Pixel by pixel, from the formula."""
    height, width = image_3HW.shape[1:]
    for _ in range(iterations):
        refined = torch.zeros_like(scores_CHW)
        for y in range(height):
            for x in range(width):
                places = [
                    (min(max(y + dy * d, 0), height - 1), min(max(x + dx * d, 0), width - 1))
                    for d in dilations
                    for dy in (-1, 0, 1)
                    for dx in (-1, 0, 1)
                    if (dy, dx) != (0, 0)
                ]
                logits = []
                for place in places:
                    terms = []
                    for c in range(3):
                        seen = [float(image_3HW[c, y, x]), *(float(image_3HW[c][p]) for p in places)]
                        sigma = math.sqrt(sum((v - sum(seen) / len(seen)) ** 2 for v in seen) / (len(seen) - 1))
                        terms.append(abs(seen[0] - float(image_3HW[c][place])) / (tolerance * sigma + 1e-8))
                    logits.append(-sum(terms) / 3)
                weights = torch.tensor(logits, dtype=scores_CHW.dtype).softmax(0)
                for weight, place in zip(weights, places, strict=True):
                    refined[:, y, x] += weight * scores_CHW[:, place[0], place[1]]
        scores_CHW = refined
    return scores_CHW


def test_as_the_formula_says() -> None:
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(3, 6, 7, generator=generator, dtype=torch.float64)
    scores = torch.rand(3, 6, 7, generator=generator, dtype=torch.float64)
    result = refine(scores, image, RefinementConfig(iterations=2, dilations=[1, 3], tolerance=0.3))
    assert result.classes_A.tolist() == [0, 1, 2]
    torch.testing.assert_close(result.scores_AHW, naive(scores, image, 2, [1, 3], 0.3))


def two_halves() -> tuple[Tensor, Tensor]:
    """An image whose left 20 of 32 columns are dark, and coarse scores that put the boundary at column 16."""
    image = torch.full((3, 32, 32), 0.2)
    image[:, :, 20:] = 0.8
    image += 0.02 * torch.rand(image.shape, generator=torch.Generator().manual_seed(1))
    coarse = torch.zeros(4, 4, 4)
    coarse[1, :, :2] = 1.0
    coarse[3, :, 2:] = 1.0
    coarse[1, :, 2] = 0.4
    return image, coarse


@pytest.mark.parametrize(
    "settings",
    [{"iterations": 10, "dilations": [1, 2, 4]}, {"method": "guided", "iterations": 1, "radius": 6, "tolerance": 0.2}],
)
def test_boundaries_move_to_the_edges_of_the_image(settings: dict[str, Any]) -> None:
    image, coarse = two_halves()
    before = refine(coarse, image, RefinementConfig(iterations=0, upscale=8))
    after = refine(coarse, image, RefinementConfig.model_validate({"upscale": 8, **settings}))
    truth = torch.where(torch.arange(32) < 20, 1, 3).expand(32, 32)

    def right(result_classes: Tensor, scores: Tensor) -> float:
        return float((result_classes[scores.argmax(0)] == truth).float().mean())

    assert after.classes_A.tolist() == [1, 3]
    assert right(before.classes_A, before.scores_AHW) < 0.92
    assert right(after.classes_A, after.scores_AHW) > 0.97


def test_an_even_image_and_even_scores_stay_finite_and_as_they_are() -> None:
    scores = torch.tensor([0.25, 0.5]).view(2, 1, 1).expand(2, 3, 5)
    result = refine(scores, torch.zeros(3, 48, 80), RefinementConfig(iterations=3, dilations=[1, 40]))
    torch.testing.assert_close(result.scores_AHW, torch.full((1, 12, 20), 0.5))
    left = torch.stack([torch.linspace(0, 1, 5).expand(3, 5), torch.linspace(1, 0, 5).expand(3, 5)])
    result = refine(left, torch.zeros(3, 48, 80), RefinementConfig(iterations=3, dilations=[1, 40]))
    torch.testing.assert_close(result.scores_AHW.sum(0), torch.ones(12, 20))


def test_the_finer_grid_is_never_finer_than_the_image() -> None:
    scores = torch.rand(3, 4, 6, generator=torch.Generator().manual_seed(2))
    for upscale, size in ((1, (4, 6)), (4, (16, 24)), (9, (32, 48))):
        config = RefinementConfig(iterations=1, upscale=upscale)
        assert refine(scores, torch.rand(3, 32, 48), config).scores_AHW.shape[1:] == size


def test_the_segmenter_names_only_classes_that_won_and_scores_them(make_model: Callable[..., ViLSeg]) -> None:
    model = make_model()
    image = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    classes = ["dog", "cat", "sofa by the sea", "grass", "a", "by", "the"]
    plain = SegmentationConfig(input_size=32, region_weight=0, calibration=1)
    model.patch_mean = model.encode_image(torch.rand(1, 3, 32, 32)).patches[0].mean(0)
    model.segmentation = plain
    coarse = Segmenter(model, classes, device="cpu")(image)
    model.segmentation = plain.replace(refinement=RefinementConfig(iterations=4, dilations=[1, 2]))
    fine = Segmenter(model, classes, device="cpu")(image)
    assert set(np.unique(fine.labels)) <= set(np.unique(coarse.labels))
    assert (fine.labels != coarse.labels).any()
    assert ((fine.scores >= 1 / 7 - 1e-6) & (fine.scores <= 1 + 1e-6)).all()
    np.testing.assert_array_equal(fine.clusters, coarse.clusters)


def test_scores_count_the_classes_that_cannot_win(make_model: Callable[..., ViLSeg]) -> None:
    model = make_model()
    even = np.full((64, 64, 3), 90, np.uint8)  # nothing to refine: scores must be those of all classes' soft-max
    model.segmentation = SegmentationConfig(input_size=64)
    plain = Segmenter(model, ["dog", "cat", "sofa by the sea", "grass"], device="cpu")(even)
    model.segmentation = SegmentationConfig(input_size=64, refinement=RefinementConfig(iterations=2, dilations=[1]))
    refined = Segmenter(model, ["dog", "cat", "sofa by the sea", "grass"], device="cpu")(even)
    assert len(np.unique(plain.labels[24:40, 24:40])) == 1
    np.testing.assert_allclose(refined.scores[24:40, 24:40], plain.scores[24:40, 24:40], atol=1e-3)


def test_bad_settings_are_refused() -> None:
    for bad in ({"iterations": -1}, {"dilations": []}, {"dilations": [0]}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            RefinementConfig(**bad)
