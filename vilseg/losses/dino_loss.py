"""Vision-based contrast: local crops must agree with what an EMA teacher says of global crops (DINO, Caron et al. 2021).

With teacher outputs g_t, student outputs g_s and the centre c, for every pair of views (v global, v' != v):

    P_t = softmax((g_t(v) - c) / tau_t),   P_s = softmax(g_s(v') / tau_s),   L = mean_{v, v'} -sum_k P_t log P_s

The centre follows the mean teacher output, c <- m c + (1 - m) mean_B g_t (equation 4), and keeps one output from winning.
ViL-Seg contrasts global against local crops in the same way (section 3.3).

The other form, :func:`crop_info_nce_loss`, asks for the picture instead of a prototype: with unit-length outputs, for every pair
of views as above and pictures i, j of all workers,

    L = mean_{v, v'} -1/B sum_i log softmax_j(<g_s(v'_i), g_t(v_j)> / tau_s)_i

(InfoNCE, van den Oord et al. 2018; against a momentum encoder as MoCo, He et al. 2020, equation 1, with the batch for queue).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vilseg.distributed import gather_rows, mean_over_workers, rank


def crop_info_nce_loss(student_VBD: Tensor, teacher_GBD: Tensor, temperature: float) -> Tensor:
    """InfoNCE of the student's views with the teacher's global views of the same pictures, negatives from all workers.

    Args:
        student_VBD: unit-length student outputs for all views, the global ones first. Shape: (V, B, D).
        teacher_GBD: unit-length teacher outputs for the global views; no gradient reaches them. Shape: (G, B, D), G <= V.
        temperature: tau_s above.

    Returns:
        This worker's share; the mean over workers is the loss of the whole batch.

    Raises:
        ValueError: shapes do not fit, or there is no pair of different views.
    """
    globals_ = len(teacher_GBD)
    _check_views(student_VBD, teacher_GBD)
    dtype = torch.promote_types(student_VBD.dtype, torch.float32)
    count = student_VBD.shape[1]
    target_B = torch.arange(count, device=student_VBD.device) + rank() * count
    terms = []
    for number in range(globals_):
        teacher_QD = gather_rows(teacher_GBD[number].detach().to(dtype))
        others = [view for view in range(len(student_VBD)) if view != number]
        logits_OBQ = student_VBD[others].to(dtype) @ teacher_QD.T / temperature
        terms.append(F.cross_entropy(logits_OBQ.flatten(0, 1), target_B.repeat(len(others))))
    return torch.stack(terms).mean()


class DINOLoss(nn.Module):
    """The loss with its centre, which is state of the run.

    Args:
        prototypes: outputs of the projection heads, K.
        student_temperature: tau_s.
        teacher_temperature: tau_t, below tau_s so that the teacher is the sharper one.
        center_momentum: m.
    """

    center: Tensor

    def __init__(
        self, prototypes: int, *, student_temperature: float, teacher_temperature: float, center_momentum: float
    ) -> None:
        super().__init__()
        self.student_temperature = student_temperature
        self.teacher_temperature = teacher_temperature
        self.center_momentum = center_momentum
        self.register_buffer("center", torch.zeros(prototypes))

    def forward(self, student_VBK: Tensor, teacher_GBK: Tensor) -> Tensor:
        """Loss of this worker's images; the mean over workers is that of the batch.

        Args:
            student_VBK: student outputs for all views, the global ones first. Shape: (V, B, K).
            teacher_GBK: teacher outputs for the global views, without gradient. Shape: (G, B, K), G <= V.

        Raises:
            ValueError: shapes do not fit, or there is no pair of different views.
        """
        views, globals_ = len(student_VBK), len(teacher_GBK)
        _check_views(student_VBK, teacher_GBK)
        dtype = torch.promote_types(student_VBK.dtype, torch.float32)
        targets_GBK = ((teacher_GBK.to(dtype) - self.center.to(dtype)) / self.teacher_temperature).softmax(-1).detach()
        log_student_VBK = (student_VBK.to(dtype) / self.student_temperature).log_softmax(-1)
        agreement_GV = torch.einsum("gbk,vbk->gv", targets_GBK, log_student_VBK) / student_VBK.shape[1]
        same_GV = torch.eye(globals_, views, dtype=torch.bool, device=agreement_GV.device)
        return -agreement_GV.masked_fill(same_GV, 0).sum() / (globals_ * views - globals_)

    @torch.no_grad()
    def update_center(self, teacher_GBK: Tensor) -> None:
        """Move the centre towards the mean teacher output of all workers; once a step, after the loss."""
        mean_K = mean_over_workers(teacher_GBK.float().mean((0, 1)))
        self.center.lerp_(mean_K, 1 - self.center_momentum)


def _check_views(student_VBK: Tensor, teacher_GBK: Tensor) -> None:
    views, globals_ = len(student_VBK), len(teacher_GBK)
    if student_VBK.shape[1:] != teacher_GBK.shape[1:] or globals_ > views or views < 2:
        raise ValueError(
            "expected (V, B, K) and (G, B, K) with 2 <= V >= G, got "
            f"{tuple(student_VBK.shape)} and {tuple(teacher_GBK.shape)}"
        )
