"""Scores carried by likeness of colours, against loops over places and offsets."""

import numpy as np
import pytest
import torch

from vilseg.segmentation import video_propagation
from vilseg.segmentation.video_propagation import (
    PropagatedScores,
    initial_scores,
    interpolate,
    patch_distances,
    propagate,
    reverse_distances,
    unmatched_fraction,
)

H, W = 9, 11
OFFSETS = [(y, x) for y in range(-2, 3) for x in range(-2, 3) if np.hypot(y, x) < 2.5]


def frame(seed: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).uniform(0, 255, (3, H, W)).astype(np.float32))


def at(map_chw: np.ndarray, y: int, x: int) -> np.ndarray:
    """The border is repeated."""
    return map_chw[:, min(max(y, 0), H - 1), min(max(x, 0), W - 1)]


def naive_difference(frame_3hw: np.ndarray, other_3hw: np.ndarray, y: int, x: int, offset: tuple[int, int]) -> float:
    total = 0.0
    for py in (-1, 0, 1):
        for px in (-1, 0, 1):
            # The patch is taken inside the frame, and its place in the other one may lie outside.
            iy, ix = min(max(y + py, 0), H - 1), min(max(x + px, 0), W - 1)
            total += np.abs(at(frame_3hw, iy, ix) - at(other_3hw, iy + offset[0], ix + offset[1])).sum()
    return total / 27


def test_differences_equal_loops() -> None:
    one, other = frame(0), frame(1)
    found = patch_distances(one, other)
    assert found.shape == (len(OFFSETS), H, W)
    for number, offset in enumerate(OFFSETS):
        for y in range(H):
            for x in range(W):
                expected = naive_difference(one.numpy(), other.numpy(), y, x, offset)
                assert float(found[number, y, x]) == pytest.approx(expected, rel=1e-5)


def test_backwards_is_the_other_way_round() -> None:
    one, other = frame(0), frame(1)
    found, direct = reverse_distances(patch_distances(one, other)), patch_distances(other, one)
    y, x = np.indices((H, W))
    for number, (down, right) in enumerate(OFFSETS):
        inside = (y + down >= 0) & (y + down < H) & (x + right >= 0) & (x + right < W)
        assert torch.isfinite(found[number]).numpy()[inside].all()
        assert torch.isinf(found[number]).numpy()[~inside].all()
        # Patches that do not touch the border are the same patches, seen from the other side.
        core = inside & (np.minimum(y, y + down) > 0) & (np.maximum(y, y + down) < H - 1)
        core &= (np.minimum(x, x + right) > 0) & (np.maximum(x, x + right) < W - 1)
        np.testing.assert_allclose(found[number].numpy()[core], direct[number].numpy()[core], rtol=1e-5)


def test_carry_equals_loops() -> None:
    chance = np.random.default_rng(2)
    d = chance.uniform(0, 20, (len(OFFSETS), H, W)).astype(np.float32)
    d[3, :4] = np.inf
    scores, trust = chance.normal(size=(4, H, W)).astype(np.float32), chance.uniform(0, 1, (1, H, W)).astype(np.float32)
    found = propagate(PropagatedScores(torch.from_numpy(scores), torch.from_numpy(trust)), torch.from_numpy(d))
    for y in range(H):
        for x in range(W):
            weights = np.exp(-d[:, y, x].astype(np.float64) / 1.5)
            weights /= weights.sum()
            moved = [at(scores, y + a, x + b) for a, b in OFFSETS]
            np.testing.assert_allclose(found.scores_Ahw[:, y, x], weights @ np.array(moved), rtol=1e-4, atol=1e-5)
            expected = weights @ np.array([at(trust, y + a, x + b)[0] for a, b in OFFSETS])
            expected *= np.exp(-d[:, y, x].min() / 30)
            assert float(found.confidence_1hw[0, y, x]) == pytest.approx(expected, rel=1e-4)


def test_scores_follow_what_moves() -> None:
    """A textured frame is shifted as a whole: labels must land where the texture does."""
    big = np.random.default_rng(5).uniform(0, 255, (3, 30, 30)).astype(np.float32)
    labels = np.random.default_rng(6).integers(0, 3, (30, 30))
    before, now = (torch.from_numpy(big[:, a : a + 20, b : b + 20].copy()) for a, b in ((5, 5), (7, 4)))
    one_hot = torch.from_numpy(np.eye(3, dtype=np.float32)[labels[5:25, 5:25]].transpose(2, 0, 1).copy())
    moved = propagate(initial_scores(one_hot), patch_distances(now, before))
    inner = np.s_[4:-4, 4:-4]
    np.testing.assert_array_equal(moved.scores_Ahw.argmax(0).numpy()[inner], labels[7:27, 4:24][inner])
    assert float(moved.confidence_1hw[0][inner].min()) == pytest.approx(1, abs=1e-4)
    assert unmatched_fraction(patch_distances(now, before), now) < 0.4, "only the rows and columns that came in"


def test_huge_differences_leave_numbers() -> None:
    black, white = torch.zeros(3, H, W), torch.full((3, H, W), 255.0)
    carried = propagate(initial_scores(torch.ones(2, H, W)), patch_distances(white, black))
    torch.testing.assert_close(carried.scores_Ahw, torch.ones(2, H, W))
    for _ in range(20):
        carried = propagate(carried, patch_distances(white, black))
    both = interpolate(carried, carried, 0.25)
    assert torch.isfinite(both).all()


def test_between_weighs_nearness_and_trust() -> None:
    zeros, ones = torch.zeros(1, 1, 3), torch.ones(1, 1, 3)
    before, after = (
        PropagatedScores(zeros, torch.tensor([[[1.0, 0.0, 0.5]]])),
        PropagatedScores(ones, torch.tensor([[[1.0, 0.5, 0.0]]])),
    )
    torch.testing.assert_close(interpolate(before, after, 0.25), torch.tensor([[[0.25, 1.0, 0.0]]]))
    lost = PropagatedScores(ones, zeros)
    torch.testing.assert_close(interpolate(PropagatedScores(zeros, zeros), lost, 0.25), torch.full((1, 1, 3), 0.25))


def test_what_has_no_match_is_told() -> None:
    assert unmatched_fraction(patch_distances(frame(0), frame(0)), frame(0)) == 0
    # In the dark, too, where all differences are small.
    assert unmatched_fraction(patch_distances(frame(0) / 16, frame(1) / 16), frame(0) / 16) > 0.9
    left = torch.zeros(3, 20, 40)
    left[:, :, 20:] = 200
    other = left.clone()
    other[:, :, :20] = 100
    assert unmatched_fraction(patch_distances(left, other), left) == pytest.approx(0.45, abs=0.1)


def test_the_disc_is_symmetric() -> None:
    assert OFFSETS == video_propagation._OFFSETS
    assert [(-y, -x) for y, x in reversed(OFFSETS)] == OFFSETS
