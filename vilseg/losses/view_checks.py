"""Shape check shared by the losses that compare views of the same images."""

from __future__ import annotations

from torch import Tensor


def check_views(student_VBK: Tensor, teacher_GBK: Tensor) -> None:
    """Raise ValueError if B or K differ, if there are more teacher views than student views, or if V < 2."""
    views, globals_ = len(student_VBK), len(teacher_GBK)
    if student_VBK.shape[1:] != teacher_GBK.shape[1:] or globals_ > views or views < 2:
        raise ValueError(
            "expected (V, B, K) and (G, B, K) with 2 <= V >= G, got "
            f"{tuple(student_VBK.shape)} and {tuple(teacher_GBK.shape)}"
        )
