"""EMA teacher of the losses on crops, and the projection head that student and teacher each have."""

from __future__ import annotations

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vilseg.training.fsdp import local_shard


class ProjectionHead(nn.Module):
    """DINO's projection head: an MLP, a bottleneck of unit length, and a linear map to the prototypes (DINO, section 3.2).

    Args:
        features: number of features of the image encoder, F.
        hidden: width of the hidden layers of the MLP.
        prototypes: number of prototypes; with 0 the head returns the bottleneck.
        bottleneck: width of the bottleneck.
    """

    prototypes: nn.Parameter | None

    def __init__(self, features: int, hidden: int, prototypes: int, bottleneck: int = 64) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(features, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, bottleneck)
        )
        self.register_parameter("prototypes", nn.Parameter(torch.randn(prototypes, bottleneck)) if prototypes else None)

    def forward(self, features_BF: Tensor) -> Tensor:
        """Return cosines with the prototypes, (B, F) -> (B, prototypes); without prototypes, unit vectors (B, bottleneck)."""
        embedded = F.normalize(self.mlp(features_BF), dim=-1)
        return embedded if self.prototypes is None else embedded @ F.normalize(self.prototypes, dim=-1).T


class EMATeacher(nn.ModuleDict):
    """Exponential moving averages of the weights of a student's ``encoder`` and ``head`` (DINO, section 3.1).

    Args:
        encoder: the student's image encoder; None if it is frozen, because the teacher's would be identical.
        head: the student's projection head.
    """

    def __init__(self, encoder: nn.Module | None, head: nn.Module) -> None:
        super().__init__(
            {
                "encoder": nn.Identity() if encoder is None else copy.deepcopy(encoder),
                "head": copy.deepcopy(head),
            }
        )
        self.requires_grad_(False)

    @torch.no_grad()
    def update_from(self, encoder: nn.Module | None, head: nn.Module, *, start: float, progress: float) -> None:
        """Move the weights towards the student's.

        Args:
            encoder: the student's image encoder; None if it is frozen.
            head: the student's projection head.
            start: momentum at the beginning of the run; it rises to 1 by a cosine (DINO, section 3.2).
            progress: fraction of the run's steps that are done, 0..1.
        """
        momentum = 1 - (1 - start) * (math.cos(math.pi * progress) + 1) / 2
        pairs = [(self["head"], head)] + ([] if encoder is None else [(self["encoder"], encoder)])
        for teacher, student in pairs:
            for old, new in zip(teacher.parameters(), student.parameters(), strict=True):
                local_shard(old).lerp_(local_shard(new), 1 - momentum)
            for kept, current in zip(teacher.buffers(), student.buffers(), strict=True):
                kept.copy_(current)
