"""Losses of two workers with half a batch each: their mean and its gradient equal those of the whole batch on one worker."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vilseg.distributed import gather_rows, mean_over_workers, rank, world_size
from vilseg.losses import (
    DINOLoss,
    contrastive_loss,
    contrastive_loss_from_scores,
    crop_info_nce_loss,
    iic_loss,
    multi_label_loss,
    sigmoid_loss,
    sigmoid_loss_from_scores,
    softmax_pooled_scores,
    top_k_pooled_scores,
)

IMAGES = 6
GRID = (4, 3)


class Towers(nn.Module):
    """Linear maps in place of the encoders and heads that are trained."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Linear(5, 4)
        self.text = nn.Linear(5, 4, bias=False)
        self.clusters = nn.Linear(5, 3)
        self.prototypes = nn.Linear(5, 8)
        self.scale = nn.Parameter(torch.tensor(6.0))
        self.bias = nn.Parameter(torch.tensor(-2.0))


def patch_contrast(patches_BND: Tensor, texts_BD: Tensor, scale: Tensor, pooling_temperature: float) -> Tensor:
    """Return the InfoNCE loss of pooled patches with the captions of all workers."""
    scores_BQ = softmax_pooled_scores(patches_BND, gather_rows(texts_BD), pooling_temperature)
    return contrastive_loss_from_scores(scores_BQ, scale)


def noun_contrast(
    patches_BND: Tensor, phrases_PD: Tensor, positives_BP: Tensor, scale: Tensor, top_patches: int
) -> Tensor:
    """Return the multi-label loss of images, scored by their most similar patches."""
    return multi_label_loss(top_k_pooled_scores(patches_BND, phrases_PD, top_patches), positives_BP, scale)


def losses_and_gradients(dtype_name: str) -> dict[str, Any]:
    """Compute the losses of this worker's images of one batch; return means over the workers of losses and gradients."""
    dtype = getattr(torch, dtype_name)
    torch.manual_seed(0)
    towers = Towers().to(dtype)
    patches, other, texts = (torch.randn(IMAGES, 12, 5), torch.randn(IMAGES, 12, 5), torch.randn(IMAGES, 5))
    phrases, positives = torch.randn(4, 5).to(dtype), torch.rand(IMAGES, 4) < 0.4
    valid, teacher = torch.rand(IMAGES, *GRID) < 0.7, torch.randn(2, IMAGES, 8)
    share = IMAGES // world_size()
    mine = slice(rank() * share, (rank() + 1) * share)
    patches, other, texts, teacher = (x.to(dtype) for x in (patches[mine], other[mine], texts[mine], teacher[:, mine]))

    def maps(view: Tensor) -> Tensor:
        return towers.clusters(view).softmax(-1).transpose(1, 2).unflatten(2, GRID)

    vision = DINOLoss(8, student_temperature=0.1, teacher_temperature=0.04, center_momentum=0.9)
    vision.center.copy_(torch.linspace(-0.1, 0.1, 8))
    embedded, captions = F.normalize(towers.image(patches), dim=-1), F.normalize(towers.text(texts), dim=-1)
    student = torch.stack([towers.prototypes(view.mean(1)) for view in (patches, other)])
    losses = {
        "contrast": contrastive_loss(F.normalize(embedded.mean(1), dim=-1), captions, towers.scale),
        "patch_contrast": patch_contrast(embedded, captions, towers.scale, 0.1),
        "sigmoid_loss": sigmoid_loss(F.normalize(embedded.mean(1), dim=-1), captions, towers.scale, towers.bias),
        "sigmoid_patches": sigmoid_loss_from_scores(
            softmax_pooled_scores(embedded, gather_rows(captions), 0.1), towers.scale, towers.bias
        ),
        "nouns": noun_contrast(
            embedded, F.normalize(towers.text(phrases), dim=-1), positives[mine], towers.scale, top_patches=3
        ),
        "mutual_information": iic_loss(maps(patches), maps(other), valid[mine], radius=1, entropy_weight=1.5),
        "vision": vision(student, teacher),
        "crop_info_nce_loss": crop_info_nce_loss(F.normalize(student, dim=-1), F.normalize(teacher, dim=-1), 0.1),
    }
    results: dict[str, Any] = {}
    for name, loss in losses.items():
        results[name] = mean_over_workers(loss.detach()).item()
        towers.zero_grad()
        loss.backward(retain_graph=True)
        for parameter, value in towers.named_parameters():
            gradient = torch.zeros_like(value) if value.grad is None else value.grad
            results[f"{name} by {parameter}"] = mean_over_workers(gradient).numpy()
    vision.update_center(teacher)
    results["centre"] = vision.center.numpy()
    return results


def both_precisions() -> dict[str, dict[str, Any]]:
    return {name: losses_and_gradients(name) for name in ("float64", "float32")}


def test_two_workers_equal_one(on_two_workers: Callable[..., list[Any]]) -> None:
    alone = both_precisions()
    for worker in on_two_workers(both_precisions):
        for precision, tolerance in (("float64", 1e-9), ("float32", 1e-5)):
            assert worker[precision].keys() == alone[precision].keys()
            for name, expected in alone[precision].items():
                loosest = max(tolerance, 1e-6) if name == "centre" else tolerance  # kept in float32
                np.testing.assert_allclose(worker[precision][name], expected, rtol=loosest, atol=loosest, err_msg=name)


def test_the_comparison_means_something() -> None:
    gradients = losses_and_gradients("float64")
    names = {name for name in gradients if " by " not in name and name != "centre"}
    assert len(names) == 8
    for name in names:
        largest = max(np.abs(value).max() for key, value in gradients.items() if key.startswith(f"{name} by"))
        assert largest > 1e-3, name


def gradients_beside_a_gather() -> dict[str, Any]:
    x, bias = (torch.full((2,), value, requires_grad=True) for value in (1.0, 2.0))
    weight = torch.tensor([[1.0], [10.0]]).expand(2, 2).flatten() * (rank() + 1)
    shift = torch.cat([bias, bias * 0])
    shift.retain_grad()
    ((gather_rows(x) + shift) * weight).sum().backward()
    assert x.grad is not None
    assert shift.grad is not None
    return {"x": x.grad.tolist(), "shift": shift.grad.tolist(), "weight": weight.tolist()}


def test_the_gradient_of_a_gather_leaves_that_of_its_neighbours_alone(
    on_two_workers: Callable[..., list[Any]],
) -> None:
    first, second = on_two_workers(gradients_beside_a_gather)
    for worker in (first, second):
        assert worker["shift"] == worker["weight"], "a bias added to gathered rows has this worker's gradient alone"
    assert first["x"] == [3.0, 3.0]
    assert second["x"] == [30.0, 30.0]
