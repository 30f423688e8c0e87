"""Learning-rate schedule, and parameter groups of the optimiser."""

from __future__ import annotations

from torch import nn

from vilseg.config import OptimizerConfig


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """Return the learning rate of a step: linear warm-up, then linear decay to zero (Bergsma et al. 2025, arXiv 2502.15938).

    Args:
        config: ``learning_rate`` after the warm-up, and ``warmup_steps``.
        step: number of the step, from 0.
        steps: total number of steps.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    return config.learning_rate * (1 - min(1.0, progress))


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict]:
    """Return AdamW's groups of the trainable parameters: those with at most one dimension have no weight decay.

    These are norms, biases and scalars such as the temperature.
    """
    trainable = [p for p in module.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
