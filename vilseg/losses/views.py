"""Input check of the losses on views."""

from __future__ import annotations

from torch import Tensor


def check_views(student_VBK: Tensor, teacher_GBK: Tensor) -> None:
    """Raise ValueError where the shapes do not fit or there is no pair of different views."""
    views, globals_ = len(student_VBK), len(teacher_GBK)
    if student_VBK.shape[1:] != teacher_GBK.shape[1:] or globals_ > views or views < 2:
        raise ValueError(
            "expected (V, B, K) and (G, B, K) with 2 <= V >= G, got "
            f"{tuple(student_VBK.shape)} and {tuple(teacher_GBK.shape)}"
        )
