"""InfoNCE loss between crops: identify, among the EMA teacher's views of the batch, the one of the same image as a student view.

With unit-length outputs g_s of the student and g_t of the teacher, for every pair of views (v global, v' != v) and images i, j of
all workers,

    L = mean_{v, v'} -1/B sum_i log softmax_j(<g_s(v'_i), g_t(v_j)> / tau_s)_i

(InfoNCE, van den Oord et al. 2018; with a momentum encoder as in MoCo, He et al. 2020, equation 1, where the negatives come from
the batch instead of a queue).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from vilseg.distributed import gather_rows, rank
from vilseg.losses.view_checks import check_views


def crop_info_nce_loss(
    student_VBD: Float[Tensor, "V B D"], teacher_GBD: Float[Tensor, "G B D"], temperature: float
) -> Float[Tensor, ""]:
    """Compute the InfoNCE loss of the student's views with the teacher's global views, with negatives from all workers.

    Args:
        student_VBD: unit-length student outputs for all views, the global ones first. V >= 2.
        teacher_GBD: unit-length teacher outputs for the global views; no gradient flows to them. G <= V.
        temperature: tau_s in the module's docstring.

    Returns:
        Loss of this worker's images; its mean over the workers is the loss of the whole batch.

    Raises:
        ValueError: the shapes do not match, or there is no pair of different views.

    Example:
        >>> student, teacher = torch.eye(4).expand(3, 4, 4), torch.eye(4).expand(2, 4, 4)
        >>> round(float(crop_info_nce_loss(student, teacher, 0.1)), 4)  # every view is closest to its own image
        0.0001
    """
    globals_ = len(teacher_GBD)
    check_views(student_VBD, teacher_GBD)
    dtype = torch.promote_types(student_VBD.dtype, torch.float32)
    count = student_VBD.shape[1]
    target_B = torch.arange(count, device=student_VBD.device) + rank() * count
    terms = []
    for number in range(globals_):
        teacher_QD = gather_rows(teacher_GBD[number].detach().to(dtype))
        others = [view for view in range(len(student_VBD)) if view != number]
        logits_RBQ = student_VBD[others].to(dtype) @ teacher_QD.T / temperature
        terms.append(F.cross_entropy(logits_RBQ.flatten(0, 1), target_B.repeat(len(others))))
    return torch.stack(terms).mean()
