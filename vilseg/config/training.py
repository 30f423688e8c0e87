"""Optimizer, workers, steps and checkpoints: parts of the run configuration."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import field_validator, model_validator

from vilseg.config.base import ConfigPart, FractionBelowOne, NonNegative, NonNegativeInt, Positive, PositiveInt
from vilseg.config.locations import Uri
from vilseg.errors import ConfigError


class OptimizerConfig(ConfigPart):
    """AdamW with linear warm-up and linear decay to zero (Bergsma et al. 2025)."""

    learning_rate: Positive = 5e-4
    weight_decay: NonNegative = 0.05
    betas: tuple[FractionBelowOne, FractionBelowOne] = (0.9, 0.98)
    """Same as CLIP for vision transformers (Radford et al. 2021, table 20)."""
    warmup_steps: NonNegativeInt = 100
    gradient_clip: NonNegative = 1.0
    """Largest norm of the gradient; 0 leaves it alone."""


class TrainerConfig(ConfigPart):
    """Workers, steps and what is kept."""

    workers: int | tuple[int, int] = 1
    """Processes that share every step; ``[1, 4]`` takes as many as the cluster has room for, and goes on with fewer where a
    machine is lost and with more where one comes."""
    batch_size: PositiveInt = 256
    """Pairs a step over all workers."""
    steps: PositiveInt = 10_000
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """bfloat16 autocasts the networks; losses are always float32. ``auto`` takes it where there are matrix units for it."""
    sharding: Literal["none", "fsdp"] = "none"
    """``fsdp`` cuts weights, gradients and optimiser states among the workers (FSDP, Zhao et al. 2023) where ``none`` gives
    each a whole copy: the same losses, less memory, more traffic. A run may change it when it is resumed. With ``fsdp`` there
    are neither metrics on held-out pairs nor images of clusters on the way."""
    chunk_size: PositiveInt | None = None
    """Pairs a forward pass of a worker; null takes all of its pairs at once. The gradient is that of the whole batch in either
    case, in the memory of one chunk and at the price of a second forward pass (GradCache, Gao et al. 2021)."""
    checkpoint_activations: bool = False
    """Keep only what goes into the blocks of the encoders and compute the rest again in the backward pass (Chen et al. 2016):
    less memory, about a third more work."""
    compile: bool = False
    """Compile the encoders by ``torch.compile``; needs a C++ compiler on every worker."""
    checkpoint_every: PositiveInt = 500
    keep_checkpoints: PositiveInt | None = 2
    """The newest so many, and the best one beside them; null keeps all."""
    best_by: str = "loss"
    """Metric of the reports by which the best checkpoint is known: of names that begin with ``loss`` the lowest, of others the
    highest. With ``data.held_out`` there are ``held_out/retrieval``, ``held_out/nouns`` and more (docs/tuning.md)."""
    log_every: PositiveInt = 20
    max_failures: NonNegativeInt = 2
    """A worker that dies is replaced this often before the run fails."""
    seed: NonNegativeInt = 0
    storage: Uri = "runs"
    """URI under which the run's folder is made."""
    examples_every: NonNegativeInt = 500
    """Steps between images of the clusters in TensorBoard; 0 for none."""
    tracking: Literal["none", "mlflow"] = "none"
    """``mlflow`` tells the server at ``MLFLOW_TRACKING_URI`` of every report too."""
    mlflow_experiment: str = "vilseg"

    @field_validator("workers")
    @classmethod
    def _some_worker(cls, workers: int | tuple[int, int]) -> int | tuple[int, int]:
        fewest, most = (workers, workers) if isinstance(workers, int) else workers
        if fewest < 1:
            raise ValueError("training needs at least 1 worker")
        if fewest > most:
            raise ValueError(f"the fewest workers, {fewest}, are more than the most, {most}")
        return workers

    @model_validator(mode="after")
    def _whole_or_chunks(self) -> Self:
        if self.sharding == "fsdp" and self.chunk_size is not None:
            raise ValueError("chunk_size needs whole weights; set sharding=none or chunk_size=null")
        return self

    @property
    def min_workers(self) -> int:
        """Smallest number of workers that training starts with."""
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def max_workers(self) -> int:
        """Largest number of workers that training uses."""
        return self.workers if isinstance(self.workers, int) else self.workers[1]

    def check_even_split(self) -> None:
        """Raise ConfigError where a step's pairs cannot be shared evenly.

        Not a part of validation: that there are too few CPUs for so many workers is the better thing to say first.
        """
        fewest = self.min_workers
        if self.batch_size % fewest and self.max_even_workers(self.max_workers) < fewest:
            raise ConfigError(
                f"trainer.batch_size {self.batch_size} cannot be shared evenly by {fewest} workers; "
                f"the nearest that can is {max(1, round(self.batch_size / fewest)) * fewest}"
            )

    def max_even_workers(self, possible: int) -> int:
        """Return the largest number of workers up to ``min(possible, max_workers)`` that divides `batch_size`; 0 if none.

        Example:
            >>> TrainerConfig(workers=(1, 8), batch_size=12).max_even_workers(5)
            4
        """
        counts = range(1, min(possible, self.max_workers) + 1)
        return max((count for count in counts if self.batch_size % count == 0), default=0)
