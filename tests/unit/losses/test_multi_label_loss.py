"""Multi-label loss of images and noun phrases: equal to loops over its formula, gradient, and edge cases."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vilseg.losses import (
    multi_label_loss,
    top_k_pooled_scores,
)

SCALE = torch.tensor(5.0, dtype=torch.float64)
POSITIVES = torch.tensor([[1, 0, 1], [0, 1, 0], [0, 0, 0], [1, 1, 0]], dtype=torch.bool)


def noun_contrast(
    patches_BND: Tensor, phrases_PD: Tensor, positives_BP: Tensor, scale: Tensor, top_patches: int
) -> Tensor:
    """Return the multi-label loss of images, scored by their most similar patches."""
    return multi_label_loss(top_k_pooled_scores(patches_BND, phrases_PD, top_patches), positives_BP, scale)


def unit(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


def one_direction(logits: list[list[float]], positives: list[list[bool]]) -> float:
    """Average -log softmax over the positives of each row, then over the rows that have a positive."""
    rows = []
    for row, wanted in zip(logits, positives, strict=True):
        normaliser = math.log(sum(math.exp(value) for value in row))
        terms = [normaliser - value for value, positive in zip(row, wanted, strict=True) if positive]
        if terms:
            rows.append(sum(terms) / len(terms))
    return sum(rows) / len(rows)


@pytest.mark.parametrize("top", [1, 2, 99])
def test_it_is_the_formula(top: int) -> None:
    patches, phrases = unit(4, 5, 3), unit(3, 3, seed=1)
    logits = []
    for image in patches.tolist():
        row = []
        for phrase in phrases.tolist():
            best = sorted((sum(a * b for a, b in zip(p, phrase, strict=True)) for p in image), reverse=True)[:top]
            row.append(5.0 * sum(best) / len(best))
        logits.append(row)
    turned = [list(column) for column in zip(*logits, strict=True)]
    expected = (one_direction(logits, POSITIVES.tolist()) + one_direction(turned, POSITIVES.T.tolist())) / 2
    assert noun_contrast(patches, phrases, POSITIVES, SCALE, top).item() == pytest.approx(expected, abs=1e-12)


def test_gradient() -> None:
    patches, phrases = unit(4, 5, 3).requires_grad_(), unit(3, 3, seed=1).requires_grad_()
    scale = SCALE.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, t, s: noun_contrast(x, t, POSITIVES, s, 2), (patches, phrases, scale))


def test_order_of_images_and_phrases_does_not_matter() -> None:
    patches, phrases = unit(4, 5, 3), unit(3, 3, seed=1)
    images, columns = torch.tensor([2, 0, 3, 1]), torch.tensor([1, 2, 0])
    shuffled = noun_contrast(patches[images], phrases[columns], POSITIVES[images][:, columns], SCALE, 2)
    assert shuffled.item() == pytest.approx(noun_contrast(patches, phrases, POSITIVES, SCALE, 2).item())


@pytest.mark.parametrize("phrases", [0, 3])
def test_a_batch_without_phrases_costs_nothing_and_keeps_its_graph(phrases: int) -> None:
    patches = unit(4, 5, 3).requires_grad_()
    loss = noun_contrast(patches, unit(phrases, 3), torch.zeros(4, phrases, dtype=torch.bool), SCALE, 2)
    loss.backward()
    assert loss.item() == 0
    assert patches.grad is not None
    assert not patches.grad.any()


@pytest.mark.usefixtures("without_annotation_checks")
def test_wrong_shape_is_told() -> None:
    with pytest.raises(ValueError, match=r"positives must be \(4, 3\), got \(3, 4\)"):
        noun_contrast(unit(4, 5, 3), unit(3, 3), POSITIVES.T, SCALE, 2)
