"""Configuration of the optimizer, the workers, the steps and the checkpoints."""

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
    """Decay rates of the two moment estimates, as CLIP's for vision transformers (Radford et al. 2021, table 20)."""
    warmup_steps: NonNegativeInt = 100
    gradient_clip: NonNegative = 1.0
    """Maximum norm of the gradient; 0 switches clipping off."""


class TrainerConfig(ConfigPart):
    """Workers, batch size, steps, memory options, checkpoints and reports."""

    workers: int | tuple[int, int] = 1
    """Number of processes that divide the batch of every step. A range such as ``[1, 4]`` uses as many as the cluster has room
    for, continues with fewer after the loss of a machine, and with more after one joins."""
    batch_size: PositiveInt = 256
    """Number of pairs in a step, over all workers."""
    steps: PositiveInt = 10_000
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the networks; losses are always float32. ``bfloat16`` uses autocast; ``auto`` selects it if the hardware has
    matrix units for it."""
    sharding: Literal["none", "fsdp"] = "none"
    """``fsdp`` shards weights, gradients and optimizer states over the workers (FSDP, Zhao et al. 2023); ``none`` gives each
    worker a full copy. The losses are the same; ``fsdp`` needs less memory and more network traffic. A resumed run may change
    this key. With ``fsdp``, training reports neither metrics on held-out pairs nor images of the clusters."""
    chunk_size: PositiveInt | None = None
    """Number of pairs in one forward pass of a worker; null takes all of its pairs at once. Chunks need the memory of one chunk
    and a second forward pass, and give the same gradient of the whole batch (GradCache, Gao et al. 2021)."""
    checkpoint_activations: bool = False
    """If true, store only the inputs of the encoders' blocks and recompute other activations in the backward pass (Chen et al.
    2016). This needs less memory and about a third more computation."""
    compile: bool = False
    """If true, compile the encoders with ``torch.compile``, which needs a C++ compiler on every worker."""
    checkpoint_every: PositiveInt = 500
    keep_checkpoints: PositiveInt | None = 2
    """Number of newest checkpoints to keep, in addition to the best one; null keeps all."""
    best_by: str = "loss"
    """Reported metric that selects the best checkpoint: the lowest value if its name begins with ``loss``, otherwise the highest.
    ``data.held_out`` adds the metrics ``held_out/retrieval``, ``held_out/nouns`` and others (docs/tuning.md)."""
    log_every: PositiveInt = 20
    max_failures: NonNegativeInt = 2
    """Maximum number of restarts after the death of a worker, before the run fails."""
    seed: NonNegativeInt = 0
    storage: Uri = "runs"
    """URI of the folder in which the run directory is created."""
    examples_every: NonNegativeInt = 500
    """Number of steps between images of the clusters in TensorBoard; 0 writes none."""
    tracking: Literal["none", "mlflow"] = "none"
    """``mlflow`` also sends every report to the server at ``MLFLOW_TRACKING_URI``."""
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
        """Raise ConfigError if the batch cannot be divided evenly among the workers.

        This is not checked in validation because an error about too few CPUs should be reported first.
        """
        fewest = self.min_workers
        if self.batch_size % fewest and self.max_even_workers(self.max_workers) < fewest:
            raise ConfigError(
                f"trainer.batch_size {self.batch_size} cannot be shared evenly by {fewest} workers; "
                f"the nearest that can is {max(1, round(self.batch_size / fewest)) * fewest}"
            )

    def max_even_workers(self, possible: int) -> int:
        """Return the largest divisor of `batch_size` that is at most ``min(possible, max_workers)``; 0 if that is less than 1.

        Example:
            >>> TrainerConfig(workers=(1, 8), batch_size=12).max_even_workers(5)
            4
        """
        counts = range(1, min(possible, self.max_workers) + 1)
        return max((count for count in counts if self.batch_size % count == 0), default=0)
