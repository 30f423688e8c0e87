"""InfoNCE and sigmoid losses of images and captions: equal to loops over their formulas, gradients, and invariances."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vilseg.losses import (
    contrastive_loss,
    contrastive_loss_from_scores,
    sigmoid_loss,
    sigmoid_loss_from_scores,
    softmax_pooled_scores,
)

SCALE = torch.tensor(7.0, dtype=torch.float64)
BIAS = torch.tensor(-3.0, dtype=torch.float64)


def unit(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


def patch_contrast(patches_BND: Tensor, texts_BD: Tensor, scale: Tensor, pooling_temperature: float) -> Tensor:
    """Return the InfoNCE loss of pooled patches with captions."""
    scores_BQ = softmax_pooled_scores(patches_BND, texts_BD, pooling_temperature)
    return contrastive_loss_from_scores(scores_BQ, scale)


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def info_nce(similarity: list[list[float]], scale: float) -> float:
    """Return -1/2B sum_i [log softmax_j(s_ij)_i + log softmax_j(s_ji)_i]."""
    count, total = len(similarity), 0.0
    for i in range(count):
        row = sum(math.exp(scale * similarity[i][j]) for j in range(count))
        column = sum(math.exp(scale * similarity[j][i]) for j in range(count))
        total += 2 * scale * similarity[i][i] - math.log(row) - math.log(column)
    return -total / (2 * count)


def test_contrast_is_the_formula() -> None:
    images, texts = unit(5, 4), unit(5, 4, seed=1)
    similarity = [[dot(x, t) for t in texts.tolist()] for x in images.tolist()]
    assert contrastive_loss(images, texts, SCALE).item() == pytest.approx(info_nce(similarity, 7.0), abs=1e-12)


def naive_sigmoid_loss(similarity: list[list[float]], scale: float, bias: float) -> float:
    """Return -1/B sum_ij log sigmoid(z_ij (s x_i t_j + b))."""
    total = 0.0
    for i, row in enumerate(similarity):
        for j, cosine in enumerate(row):
            z = 1 if i == j else -1
            total += math.log(1 / (1 + math.exp(-z * (scale * cosine + bias))))
    return -total / len(similarity)


def test_sigmoid_contrast_is_the_formula() -> None:
    images, texts = unit(5, 4), unit(5, 4, seed=1)
    similarity = [[dot(x, t) for t in texts.tolist()] for x in images.tolist()]
    expected = naive_sigmoid_loss(similarity, 7.0, -3.0)
    assert sigmoid_loss(images, texts, SCALE, BIAS).item() == pytest.approx(expected, abs=1e-12)


def test_sigmoid_contrast_is_the_published_pseudocode() -> None:
    """SigLIP, algorithm 1, line by line."""
    images, texts = unit(6, 4), unit(6, 4, seed=1)
    logits = images @ texts.T * SCALE + BIAS
    labels = 2 * torch.eye(6, dtype=torch.float64) - torch.ones(6, 6, dtype=torch.float64)
    expected = -torch.sum(F.logsigmoid(labels * logits)) / 6
    assert sigmoid_loss(images, texts, SCALE, BIAS).item() == pytest.approx(expected.item(), abs=1e-12)


def test_at_its_start_the_bias_makes_every_pair_a_wrong_one() -> None:
    """With scale 10 and bias -10 the many negatives cost almost nothing and each positive about 10 (SigLIP, section 3.2)."""
    images, texts = unit(64, 256), unit(64, 256, seed=1)
    loss = sigmoid_loss(images, texts, torch.tensor(10.0), torch.tensor(-10.0))
    assert loss.item() == pytest.approx(10, abs=0.2)


@pytest.mark.parametrize("temperature", [0.05, 1.0])
@pytest.mark.parametrize("form", ["infonce", "sigmoid"])
def test_patch_contrast_is_the_formula(temperature: float, form: str) -> None:
    patches, texts = unit(4, 6, 3), unit(4, 3, seed=1)
    similarity = []
    for image in patches.tolist():
        row = []
        for text in texts.tolist():
            cosines = [dot(patch, text) for patch in image]
            weights = [math.exp(cosine / temperature) for cosine in cosines]
            row.append(dot(weights, cosines) / sum(weights))
        similarity.append(row)
    if form == "sigmoid":
        loss = sigmoid_loss_from_scores(softmax_pooled_scores(patches, texts, temperature), SCALE, BIAS)
        assert loss.item() == pytest.approx(naive_sigmoid_loss(similarity, 7.0, -3.0), abs=1e-12)
    else:
        loss = patch_contrast(patches, texts, SCALE, temperature)
        assert loss.item() == pytest.approx(info_nce(similarity, 7.0), abs=1e-12)


def test_a_hot_pooling_temperature_gives_the_mean_of_the_patches() -> None:
    patches, texts = unit(4, 6, 3), unit(4, 3, seed=1)
    pooled = patch_contrast(patches, texts, SCALE, 1e9)
    assert pooled.item() == pytest.approx(contrastive_loss(patches.mean(1), texts, SCALE).item(), rel=1e-8)


def test_gradients() -> None:
    scale = SCALE.clone().requires_grad_()
    texts = unit(3, 4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(contrastive_loss, (unit(3, 4).requires_grad_(), texts, scale))
    bias = BIAS.clone().requires_grad_()
    assert torch.autograd.gradcheck(sigmoid_loss, (unit(3, 4).requires_grad_(), texts, scale, bias))
    patches = unit(3, 5, 4).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda p, t, s, b: sigmoid_loss_from_scores(softmax_pooled_scores(p, t, 0.1), s, b),
        (patches, texts, scale, bias),
    )
    assert torch.autograd.gradcheck(lambda p, t, s: patch_contrast(p, t, s, 0.1), (patches, texts, scale))


def test_order_of_pairs_and_of_patches_does_not_matter() -> None:
    images, texts, patches = unit(6, 4), unit(6, 4, seed=1), unit(6, 5, 4, seed=2)
    order, inner = torch.tensor([3, 0, 5, 1, 4, 2]), torch.tensor([4, 2, 0, 1, 3])
    assert contrastive_loss(images[order], texts[order], SCALE).item() == pytest.approx(
        contrastive_loss(images, texts, SCALE).item()
    )
    assert sigmoid_loss(images[order], texts[order], SCALE, BIAS).item() == pytest.approx(
        sigmoid_loss(images, texts, SCALE, BIAS).item()
    )
    shuffled = patch_contrast(patches[order][:, inner], texts[order], SCALE, 0.1)
    assert shuffled.item() == pytest.approx(patch_contrast(patches, texts, SCALE, 0.1).item())


def test_right_pairs_cost_less_than_wrong_ones_and_chance_costs_log_b() -> None:
    texts = torch.eye(4, dtype=torch.float64)
    right, wrong = contrastive_loss(texts, texts, SCALE), contrastive_loss(texts.roll(1, 0), texts, SCALE)
    assert right < math.log(4) < wrong
    same = torch.ones(4, 4, dtype=torch.float64) / 2
    assert contrastive_loss(same, texts, SCALE).item() == pytest.approx(math.log(4))


def test_half_precision_is_computed_in_float32() -> None:
    images, texts = unit(8, 16).bfloat16(), unit(8, 16, seed=1).bfloat16()
    loss = contrastive_loss(images, texts, torch.tensor(100.0))
    assert loss.dtype == torch.float32
    assert torch.equal(loss, contrastive_loss(images.float(), texts.float(), torch.tensor(100.0)))


@pytest.mark.usefixtures("without_annotation_checks")
def test_wrong_shapes_are_told() -> None:
    with pytest.raises(ValueError, match=r"\(4, 3\) and \(5, 3\)"):
        contrastive_loss(unit(4, 3), unit(5, 3), SCALE)
    with pytest.raises(ValueError, match=r"\(4, 3\) and \(5, 3\)"):
        sigmoid_loss(unit(4, 3), unit(5, 3), SCALE, BIAS)
