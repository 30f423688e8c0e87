"""CPU time of forward and backward of each loss, compared with a naive version that follows the loss's formula.

The naive versions are Python loops over the indices of the sums (images, captions, views, displacements) with one torch
expression per iteration. IIC is measured for 64 images of 14 x 14 patches, 25 clusters and the nine displacements of radius 1. It
is compared with equation 5 of Ji et al. 2019 as written (a sum of outer products of assignments), and separately with the
published code of its authors (one convolution with the other map as kernel), which does not count as naive. The timed versions
alternate in rounds.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

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

_ROUNDS = 9
_PAIRS, _PATCHES, _WIDTH, _PHRASES = 64, 49, 128, 100
_CLUSTERS, _GRID = 25, 14
_SCALE, _BIAS, _POOLING, _TOP, _ENTROPY_WEIGHT = 14.3, -10.0, 0.1, 8, 1.5
_VIEWS, _GLOBALS, _PROTOTYPES = 4, 2, 256
_TOLERANCE = 1e-3
"""Largest difference between the gradients of the two, as a fraction of the largest entry."""

Loss = Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    """Two implementations of the same loss, and inputs for both."""

    ours: Loss
    naive: Loss
    inputs: tuple[Tensor, ...]


def main(out: Path) -> dict[str, Any]:
    """Run the benchmark on one CPU thread.

    Args:
        out: not used.

    Returns:
        ``ratio`` (time of the naive version over time of ours, median of the rounds, the smallest value of all losses),
        ``losses`` (for each loss this ratio and the milliseconds of both versions), and ``iic_authors_ratio``, the ratio for
        the authors' code.

    Raises:
        AssertionError: the two versions differ in the loss or its gradients.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        cases = _cases()
        for name, case in cases.items():
            _compare(name, case)
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
        for _ in range(_ROUNDS):
            for name, case in cases.items():
                seconds[name].append((_time(case.naive, case.inputs), _time(case.ours, case.inputs)))
    finally:
        torch.set_num_threads(threads)
    authors = seconds.pop("iic_authors")
    return {
        "benchmark": "losses",
        "ratio": min(_ratio(rounds) for rounds in seconds.values()),
        "losses": {
            name: {
                "ratio": _ratio(rounds),
                "naive_milliseconds": round(1000 * median(naive for naive, _ in rounds), 2),
                "milliseconds": round(1000 * median(ours for _, ours in rounds), 2),
            }
            for name, rounds in seconds.items()
        },
        "iic_authors_ratio": _ratio(authors),
        "rounds": _ROUNDS,
    }


def _ratio(rounds: list[tuple[float, float]]) -> float:
    return round(median(naive / ours for naive, ours in rounds), 2)


def _time(loss: Loss, inputs: tuple[Tensor, ...]) -> float:
    for tensor in inputs:
        tensor.grad = None
    started = time.process_time()  # CPU time of one thread: what the work costs, whatever else the machine does
    loss(*inputs).backward()
    return time.process_time() - started


def _compare(name: str, case: Case) -> None:
    results = []
    for loss in (case.ours, case.naive):
        for tensor in case.inputs:
            tensor.grad = None
        value = loss(*case.inputs)
        value.backward()
        results.append([value.detach(), *(tensor.grad for tensor in case.inputs if tensor.grad is not None)])
    for ours, naive in zip(*results, strict=True):
        assert (ours - naive).abs().max() <= _TOLERANCE * naive.abs().max(), f"{name}: the two ways differ"


def _cases() -> dict[str, Case]:
    torch.manual_seed(0)
    images, texts, patches = _unit(_PAIRS, _WIDTH), _unit(_PAIRS, _WIDTH), _unit(_PAIRS, _PATCHES, _WIDTH)
    phrases = _unit(_PHRASES, _WIDTH)
    positives = torch.rand(_PAIRS, _PHRASES) < 0.03
    scale, bias = torch.tensor(_SCALE), torch.tensor(_BIAS)
    maps = tuple(torch.randn(_PAIRS, _CLUSTERS, _GRID, _GRID).softmax(1).requires_grad_() for _ in range(2))
    dino = DINOLoss(_PROTOTYPES, student_temperature=0.1, teacher_temperature=0.04, center_momentum=0.9)
    student, teacher = _cosines(_VIEWS).requires_grad_(), _cosines(_GLOBALS)
    crops, of_teacher = _unit(_VIEWS, _PAIRS, 64), _unit(_GLOBALS, _PAIRS, 64).detach()

    def ours_iic(first: Tensor, second: Tensor) -> Tensor:
        return iic_loss(first, second, radius=1, entropy_weight=_ENTROPY_WEIGHT)

    return {
        "contrast": Case(lambda x, t: contrastive_loss(x, t, scale), _info_nce, (images, texts)),
        "sigmoid_contrast": Case(lambda x, t: sigmoid_loss(x, t, scale, bias), _sigmoid, (images, texts)),
        "patch_contrast": Case(lambda p, t: _patch_contrast(p, t, scale, _POOLING), _patch_info_nce, (patches, texts)),
        "patch_sigmoid": Case(
            lambda p, t: sigmoid_loss_from_scores(softmax_pooled_scores(p, t, _POOLING), scale, bias),
            lambda p, t: _sigmoid_of(_pooled(p, t)),
            (patches, texts),
        ),
        "nouns": Case(
            lambda p, t: _noun_contrast(p, t, positives, scale, _TOP),
            lambda p, t: _nouns(p, t, positives),
            (patches, phrases),
        ),
        "vision_dino": Case(lambda s: dino(s, teacher), lambda s: _dino(s, teacher), (student,)),
        "vision_infonce": Case(
            lambda s: crop_info_nce_loss(s, of_teacher, 0.1), lambda s: _crops(s, of_teacher), (crops,)
        ),
        "iic": Case(ours_iic, lambda a, b: _iic(_joints_as_written(a, b)), maps),
        "iic_authors": Case(ours_iic, lambda a, b: _iic(_joints_by_convolution(a, b)), maps),
    }


def _patch_contrast(patches_BND: Tensor, texts_BD: Tensor, scale: Tensor, pooling_temperature: float) -> Tensor:
    """InfoNCE of pooled patches and the captions of all workers."""
    scores_BQ = softmax_pooled_scores(patches_BND, texts_BD, pooling_temperature)
    return contrastive_loss_from_scores(scores_BQ, scale)


def _noun_contrast(
    patches_BND: Tensor, phrases_PD: Tensor, positives_BP: Tensor, scale: Tensor, top_patches: int
) -> Tensor:
    """Multi-label loss of images by their best patches."""
    return multi_label_loss(top_k_pooled_scores(patches_BND, phrases_PD, top_patches), positives_BP, scale)


def _unit(*shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape), dim=-1).requires_grad_()


def _cosines(views: int) -> Tensor:
    return torch.randn(views, _PAIRS, _PROTOTYPES) / 8


# ---------------------------------------------------------------------------------------------------- the formulas


def _info_nce(images: Tensor, texts: Tensor) -> Tensor:
    return _info_nce_of([[image @ text for text in texts] for image in images])


def _info_nce_of(similarity: list[list[Tensor]]) -> Tensor:
    rows = torch.stack([torch.stack(row) for row in similarity])
    total = torch.zeros(())
    for i in range(len(rows)):
        total = total - (_SCALE * rows[i]).log_softmax(0)[i] - (_SCALE * rows[:, i]).log_softmax(0)[i]
    return total / (2 * len(rows))


def _sigmoid(images: Tensor, texts: Tensor) -> Tensor:
    return _sigmoid_of([[image @ text for text in texts] for image in images])


def _sigmoid_of(similarity: list[list[Tensor]]) -> Tensor:
    total = torch.zeros(())
    for i, row in enumerate(similarity):
        for j, value in enumerate(row):
            total = total - F.logsigmoid((1 if i == j else -1) * (_SCALE * value + _BIAS))
    return total / len(similarity)


def _pooled(patches: Tensor, texts: Tensor) -> list[list[Tensor]]:
    similarity = []
    for image in patches:
        row = []
        for text in texts:
            cosines = image @ text
            row.append((cosines / _POOLING).softmax(0) @ cosines)
        similarity.append(row)
    return similarity


def _patch_info_nce(patches: Tensor, texts: Tensor) -> Tensor:
    return _info_nce_of(_pooled(patches, texts))


def _nouns(patches: Tensor, phrases: Tensor, positives: Tensor) -> Tensor:
    scores = torch.stack(
        [torch.stack([(image @ phrase).topk(_TOP).values.mean() for phrase in phrases]) for image in patches]
    )
    directions = []
    for logits, wanted in ((_SCALE * scores, positives), (_SCALE * scores.T, positives.T)):
        rows = [-row.log_softmax(0)[mask].mean() for row, mask in zip(logits, wanted, strict=True) if mask.any()]
        directions.append(torch.stack(rows).mean())
    return (directions[0] + directions[1]) / 2


def _dino(student: Tensor, teacher: Tensor) -> Tensor:
    terms = []
    for g, of_teacher in enumerate(teacher):
        for v, of_student in enumerate(student):
            if v != g:
                for target, guess in zip(of_teacher, of_student, strict=True):
                    terms.append(-((target / 0.04).softmax(0) * (guess / 0.1).log_softmax(0)).sum())
    return torch.stack(terms).mean()


def _crops(student: Tensor, teacher: Tensor) -> Tensor:
    terms = []
    for g, of_teacher in enumerate(teacher):
        for v, of_student in enumerate(student):
            if v != g:
                for i, crop in enumerate(of_student):
                    terms.append(-(of_teacher @ crop / 0.1).log_softmax(0)[i])
    return torch.stack(terms).mean()


def _joints_as_written(first: Tensor, second: Tensor) -> list[Tensor]:
    """Equation 5: for a displacement the mean over images and patches of the outer products."""
    joints = []
    for down in (-1, 0, 1):
        for right in (-1, 0, 1):
            here = first[:, :, max(0, -down) : _GRID - max(0, down), max(0, -right) : _GRID - max(0, right)]
            there = second[:, :, max(0, down) : _GRID - max(0, -down), max(0, right) : _GRID - max(0, -right)]
            joints.append((here.unsqueeze(2) * there.unsqueeze(1)).mean((0, 3, 4)))
    return joints


def _joints_by_convolution(first: Tensor, second: Tensor) -> list[Tensor]:
    """As the authors' code: clusters for a batch, images for channels, the other map for a kernel."""
    maps = first.transpose(0, 1).contiguous(), second.transpose(0, 1).contiguous()
    joints = F.conv2d(maps[0], weight=maps[1], padding=(1, 1))
    return list(joints.permute(2, 3, 0, 1).flatten(0, 1))


def _iic(joints: list[Tensor]) -> Tensor:
    information = []
    for joint in joints:
        symmetric = joint / joint.sum()
        symmetric = (symmetric + symmetric.T) / 2
        by_row, by_column = symmetric.sum(1, keepdim=True).log(), symmetric.sum(0, keepdim=True).log()
        information.append((symmetric * (symmetric.log() - _ENTROPY_WEIGHT * (by_row + by_column))).sum())
    return -torch.stack(information).mean()
