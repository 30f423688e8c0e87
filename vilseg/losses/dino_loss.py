"""DINO loss: the student's output for a crop must match the EMA teacher's for a global crop (DINO, Caron et al. 2021).

With teacher outputs g_t, student outputs g_s and the centre c, for every pair of views (v global, v' != v):

    P_t = softmax((g_t(v) - c) / tau_t),   P_s = softmax(g_s(v') / tau_s),   L = mean_{v, v'} -sum_k P_t log P_s

The centre follows the mean teacher output, c <- m c + (1 - m) mean_B g_t (equation 4), so that no single dimension dominates.
ViL-Seg contrasts global with local crops in the same way (section 3.3).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vilseg.distributed import mean_over_workers
from vilseg.losses.view_checks import check_views


class DINOLoss(nn.Module):
    """DINO loss with its centre, a buffer that is saved in checkpoints.

    Args:
        prototypes: number of outputs of the projection heads, K.
        student_temperature: tau_s.
        teacher_temperature: tau_t; lower than tau_s, so that the teacher's distribution is sharper.
        center_momentum: m.

    Example:
        >>> dino = DINOLoss(4, student_temperature=0.1, teacher_temperature=0.04, center_momentum=0.9)
        >>> student, teacher = torch.eye(4).expand(3, 4, 4), torch.eye(4).expand(2, 4, 4)
        >>> round(float(dino(student, teacher)), 4)  # all views agree
        0.0001
        >>> dino.update_center(teacher)
        >>> dino.center
        tensor([0.0250, 0.0250, 0.0250, 0.0250])
    """

    center: Float[Tensor, " K"]

    def __init__(
        self, prototypes: int, *, student_temperature: float, teacher_temperature: float, center_momentum: float
    ) -> None:
        super().__init__()
        self.student_temperature = student_temperature
        self.teacher_temperature = teacher_temperature
        self.center_momentum = center_momentum
        self.register_buffer("center", torch.zeros(prototypes))

    def forward(self, student_VBK: Float[Tensor, "V B K"], teacher_GBK: Float[Tensor, "G B K"]) -> Float[Tensor, ""]:
        """Compute the loss of this worker's images; its mean over the workers is the loss of the whole batch.

        Args:
            student_VBK: student outputs for all views, the global ones first. V >= 2.
            teacher_GBK: teacher outputs for the global views; no gradient flows to them. G <= V.

        Raises:
            ValueError: the shapes do not match, or there is no pair of different views.
        """
        views, globals_ = len(student_VBK), len(teacher_GBK)
        check_views(student_VBK, teacher_GBK)
        dtype = torch.promote_types(student_VBK.dtype, torch.float32)
        targets_GBK = ((teacher_GBK.to(dtype) - self.center.to(dtype)) / self.teacher_temperature).softmax(-1).detach()
        log_student_VBK = (student_VBK.to(dtype) / self.student_temperature).log_softmax(-1)
        agreement_GV = torch.einsum("gbk,vbk->gv", targets_GBK, log_student_VBK) / student_VBK.shape[1]
        same_GV = torch.eye(globals_, views, dtype=torch.bool, device=agreement_GV.device)
        return -agreement_GV.masked_fill(same_GV, 0).sum() / (globals_ * views - globals_)

    @torch.no_grad()
    def update_center(self, teacher_GBK: Float[Tensor, "G B K"]) -> None:
        """Move the centre towards the mean teacher output of all workers. Call it once per step, after the loss."""
        mean_K = mean_over_workers(teacher_GBK.float().mean((0, 1)))
        self.center.lerp_(mean_K, 1 - self.center_momentum)
