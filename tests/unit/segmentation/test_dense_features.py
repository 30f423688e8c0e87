"""Dense features from overlapping windows."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from vilseg.config import RunConfig, SegmentationConfig
from vilseg.errors import ConfigError
from vilseg.model import ViLSeg
from vilseg.segmentation.dense_features import encode_images
from vilseg.segmentation.segmenter import Segmenter

Make = Callable[..., ViLSeg]


@pytest.fixture(autouse=True)
def _exact(monkeypatch: pytest.MonkeyPatch) -> None:
    # bfloat16, where the machine has units for it, rounds differently for every size.
    monkeypatch.setattr("vilseg.segmentation.dense_features.has_bfloat16_units", lambda device: False)


def noise(*size: int) -> Tensor:
    return torch.randint(0, 256, size, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def settings(window: int | None, overlap: int | None = None) -> SegmentationConfig:
    return SegmentationConfig(window=window, overlap=overlap)


def test_windows_of_a_local_encoder_see_what_one_pass_sees(make_model: Make) -> None:
    model = make_model()  # its patches see about 10 pixels around them, less than a quarter of the overlap
    pixels = noise(2, 3, 128, 192)
    whole = encode_images(model, pixels, settings(None))
    windows = encode_images(model, pixels, settings(96, 48))
    assert len(windows) == 2
    for one, other in zip(whole, windows, strict=True):
        assert one.grid == other.grid == (128 // 4, 192 // 4)
        torch.testing.assert_close(other.patches_ND, one.patches_ND, atol=1e-4, rtol=0)
        torch.testing.assert_close(other.assignments_NK, one.assignments_NK, atol=1e-4, rtol=0)


def test_labels_by_windows_are_those_of_one_pass(make_model: Make) -> None:
    model = make_model()
    model.patch_mean = encode_images(model, noise(1, 3, 64, 64), settings(None))[0].patches_ND.mean(0)
    image = noise(200, 312, 3).numpy()
    results = []
    for window in (None, 96):
        model.segmentation = SegmentationConfig(input_size=200, window=window, region_weight=0.5, calibration=1)
        results.append(Segmenter(model, ["dog", "cat", "grass", "sea"], device="cpu")(image))
    whole, windows = results
    assert len(np.unique(whole.labels)) > 1
    assert (windows.labels == whole.labels).mean() >= 0.99
    np.testing.assert_allclose(windows.scores, whole.scores, atol=0.01)


def test_of_an_encoder_that_sees_everything_windows_are_blended_as_the_formula_says(make_model: Make) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = make_model(image_encoder={"architecture": "vit", "sizes": {**sizes, "patch_size": 8, "image_size": 32}})
    pixels = noise(1, 3, 32, 48)
    [found] = encode_images(model, pixels, settings(32, 16))
    left, right = (encode_images(model, pixels[..., start : start + 32], settings(None))[0] for start in (0, 16))
    # Two patches are shared: their centres lie half a patch and one and a half from either end.
    rise = [np.sin(np.pi / 2 * np.clip(2 * (x + 0.5) / 2 - 0.5, 0, 1)) ** 2 for x in range(2)]
    for name, size in (("patches_ND", 8), ("assignments_NK", 5)):
        one, other = (getattr(features, name).view(4, 4, size) for features in (left, right))
        expected = torch.empty(4, 6, size)
        expected[:, :2], expected[:, 4:] = one[:, :2], other[:, 2:]
        for column in range(2):
            expected[:, 2 + column] = (1 - rise[column]) * one[:, 2 + column] + rise[column] * other[:, column]
        if name == "patches_ND":
            expected = torch.nn.functional.normalize(expected, dim=-1)
        torch.testing.assert_close(getattr(found, name).view(4, 6, size), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(found.assignments_NK.sum(1), torch.ones(24))


def test_no_pass_is_larger_than_a_window(make_model: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    seen: list[tuple[int, ...]] = []
    encode = model.image_features
    monkeypatch.setattr(model, "image_features", lambda x: (seen.append(tuple(x.shape[2:])), encode(x))[1])
    model.segmentation = SegmentationConfig(input_size=96, window=50)  # 12 patches
    segmenter = Segmenter(model, ["dog", "cat"], device="cpu")
    result = segmenter(np.zeros((60, 300, 3), np.uint8))
    assert result.labels.shape == (60, 300)
    assert set(seen) == {(48, 48)}
    seen.clear()
    model.segmentation = SegmentationConfig(input_size=48, window=48)
    Segmenter(model, ["dog", "cat"], device="cpu")(np.zeros((30, 30, 3), np.uint8))
    assert seen == [(48, 48)]


def test_an_overlap_that_does_not_fit_is_told() -> None:
    with pytest.raises(ValueError, match="windows of 224 pixels cannot overlap by 120; at most 112"):
        settings(224, 120)
    with pytest.raises(ConfigError, match=r"segmentation.*at most 112"):
        RunConfig.load(None, ["data.source=a", "segmentation.window=224", "segmentation.overlap=120"])
