"""The training loop over any iterable of batches, and the state that a run resumes from."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vilseg.config import OptimizerConfig, TrainerConfig
from vilseg.data.batch_reader import WorkerBatch
from vilseg.device import require_compiler
from vilseg.distributed import gather_objects, mean_over_workers, rank
from vilseg.errors import DataError, UserError
from vilseg.training.batch import TensorBatch
from vilseg.training.fsdp import clip_gradient_norm, full_state, is_sharded, shard_like
from vilseg.training.grad_cache import backward_in_chunks, require_per_sample_encoders
from vilseg.training.lr_schedule import learning_rate, parameter_groups
from vilseg.training.objective import Objective
from vilseg.training.prefetch import copy_to_device


class NonFiniteLossError(UserError):
    """Loss or gradient norm is NaN or infinite.

    Args:
        message: the error message.
        details: content of :attr:`RunDirectory.nonfinite`: ``step``, ``losses`` by name, and ``keys`` of all pairs of the step.
    """

    def __init__(self, message: str, details: dict[str, Any]) -> None:
        super().__init__(message)
        self.details = details

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.details)


@dataclass
class Trainer:
    """Training loop of an objective, with its optimiser and the number of steps done.

    Args:
        objective: objective to train.
        optimizer: settings of AdamW and of the learning-rate schedule.
        trainer: settings of the loop: batch size, number of steps, intervals of reports and checkpoints.
        device: device of the objective.
        wrap: function that makes the objective data-parallel, or shards its weights in place; the identity for one process.
    """

    objective: Objective
    optimizer: OptimizerConfig
    trainer: TrainerConfig
    device: torch.device
    wrap: Callable[[nn.Module], nn.Module] = lambda module: module

    def __post_init__(self) -> None:
        self.step = 0
        if self.trainer.checkpoint_activations:
            self.objective.model.checkpoint_activations()
        if self.trainer.compile:
            require_compiler(self.device)
            self.objective.compile_encoders()
        self._module = self.wrap(self.objective)
        self._adamw = torch.optim.AdamW(
            parameter_groups(self.objective, self.optimizer.weight_decay),
            lr=self.optimizer.learning_rate,
            betas=self.optimizer.betas,
            fused=self.device.type == "cuda",
        )
        # The fused kernel can skip an update on the device (``found_inf``), but not with sharded weights.
        self._skips_on_device = self.device.type == "cuda" and not any(map(is_sharded, self.objective.parameters()))
        self._skipped = False

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a run resumes from: tensors and plain Python values, loadable with ``weights_only``.

        It does not depend on the number of workers or on sharding. With sharded weights the method is collective: call it
        on every rank; only rank 0 gets the full tensors, the others get None in their place.
        """
        return {
            "step": self.step,
            "objective": full_state(dict(self.objective.state_dict())),
            "optimizer": full_state(self._adamw.state_dict()),
        }

    def model_weights(self) -> dict[str, Any]:
        """Return the model's weights by name.

        With sharded weights the method is collective: call it on every rank; only rank 0 gets the full tensors.
        """
        return full_state(dict(self.objective.model.state_dict()))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that :meth:`state_dict` returned, but keep the weight decay and betas of this trainer."""
        self.step = state["step"]
        present = self.objective.state_dict()
        weights = state["objective"].items()
        self.objective.load_state_dict({k: shard_like(v, present[k]) if k in present else v for k, v in weights})
        optimised = [parameter for group in self._adamw.param_groups for parameter in group["params"]]
        moments = {
            index: {
                name: value if name == "step" else shard_like(value, optimised[index]) for name, value in of.items()
            }
            for index, of in state["optimizer"]["state"].items()
        }
        settings = [{name: group[name] for name in ("weight_decay", "betas")} for group in self._adamw.param_groups]
        self._adamw.load_state_dict({**state["optimizer"], "state": moments})
        for group, of_now in zip(self._adamw.param_groups, settings, strict=True):
            group.update(of_now)

    def train(
        self,
        batches: Iterable[WorkerBatch],
        *,
        on_report: Callable[[dict[str, float]], None],
        on_checkpoint: Callable[[], object],
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """Train from the current step to the last one, or until ``should_stop`` returns True.

        Args:
            batches: batches from the current step on.
            on_report: function of the metrics, called every ``log_every`` steps and before every checkpoint that is not due to
                ``should_stop``. Metrics are losses and the gradient norm before clipping (means over workers and over the steps
                since the last report), learning rate, images per second of all workers together, fraction of time that this
                worker spent waiting for data, and more.
            on_checkpoint: function called every ``checkpoint_every`` steps, after the last step, and before a stop.
            should_stop: function called after every step; True stops the training after a checkpoint.

        Raises:
            DataError: the batches end before the last step.
            NonFiniteLossError: the loss or the norm of its gradient was NaN or infinite in a step since the last report.
        """
        self._module.train()
        if self.trainer.chunk_size is not None:
            require_per_sample_encoders(self.objective)
        meter = _Meter(self.trainer.batch_size)
        stream = copy_to_device(meter.timed(batches), self.device)
        while self.step < self.trainer.steps:
            batch = next(stream, None)
            if batch is None:
                raise DataError(f"the pairs ended after step {self.step} of {self.trainer.steps}")
            meter.add(self.train_step(batch), batch.keys)
            self.step += 1
            due = self.step == self.trainer.steps or self.step % self.trainer.checkpoint_every == 0
            if due or self._skipped or self.step % self.trainer.log_every == 0:
                on_report(self._metrics(meter))  # before the checkpoint, because it raises if the loss is NaN
            stop = should_stop()
            if due or stop:
                on_checkpoint()
            if stop:
                return

    def train_step(self, batch: TensorBatch) -> dict[str, Tensor]:
        """Make one optimiser step; return this worker's losses by name, and ``gradient_norm``, the norm before clipping."""
        # Dropout inside the encoders draws from torch's generator. Seeded by step and rank, a resumed run repeats the draws of
        # an uninterrupted one, and the workers draw different numbers.
        torch.manual_seed(hash((self.trainer.seed, self.step, rank())))
        for group in self._adamw.param_groups:
            group["lr"] = learning_rate(self.optimizer, self.step, self.trainer.steps)
        self._adamw.zero_grad(set_to_none=True)
        losses = self._backward(batch)
        norm = clip_gradient_norm(self.objective.parameters(), self.optimizer.gradient_clip or math.inf)
        self._update(norm)
        self.objective.after_update(self.step / self.trainer.steps)
        return {name: value.detach() for name, value in losses.items()} | {"gradient_norm": norm.detach()}

    def _update(self, norm: Tensor) -> None:
        """Update the weights unless the gradient norm, which is the same on all workers, is NaN or infinite.

        On a GPU the optimiser's kernel checks the norm, so that the host does not wait for it. The next report raises
        `NonFiniteLossError`.
        """
        if self._skips_on_device:
            self._adamw.found_inf = norm.isfinite().logical_not().float()  # type: ignore[attr-defined]
            self._adamw.step()
        elif bool(norm.isfinite()):
            self._adamw.step()
        else:
            self._skipped = True

    def _backward(self, batch: TensorBatch) -> dict[str, Tensor]:
        """Return this worker's losses by name; the gradient of ``loss`` is stored in the parameters."""
        size = self.trainer.chunk_size
        if size is not None and size < len(batch):
            return backward_in_chunks(self.objective, batch, size)
        losses = self._module(batch)
        losses["loss"].backward()
        return losses

    def _metrics(self, meter: _Meter) -> dict[str, float]:
        metrics, steps = meter.read()
        # A finite loss may still have a gradient that is not finite.
        watched = {"loss": "the loss", "gradient_norm": "the gradient's norm"}
        if not all(math.isfinite(metrics[name]) for name in watched):
            number, name = next(
                (i, name) for i, step in enumerate(steps) for name in watched if not math.isfinite(step.losses[name])
            )
            keys = [key for share in gather_objects(steps[number].keys) for key in share]
            at = self.step - len(steps) + number + 1
            # JSON has no NaN or infinity.
            losses = {key: x if math.isfinite(x) else str(x) for key, x in steps[number].losses.items()}
            raise NonFiniteLossError(
                f"{watched[name]} is {steps[number].losses[name]} at step {at} (pairs {', '.join(keys[:4])}, ...); "
                "a lower optimizer.learning_rate or trainer.precision=float32 may help",
                {"step": at, "losses": losses, "keys": keys},
            )
        return {
            "step": self.step,
            "samples": self.step * self.trainer.batch_size,
            **metrics,
            "learning_rate": learning_rate(self.optimizer, self.step - 1, self.trainer.steps),
            "temperature": float(1 / self.objective.model.scale.detach()),
        }


@dataclass(frozen=True)
class _Step:
    """Losses and pairs of one training step."""

    losses: dict[str, float]
    """Losses by name, means over the workers."""
    keys: tuple[str, ...]
    """Keys of this worker's pairs."""


class _Meter:
    """Collector of losses and of timings between two reports; losses stay on the device until :meth:`read`."""

    def __init__(self, batch_size: int) -> None:
        self._batch_size = batch_size
        self._reset()

    def _reset(self) -> None:
        self._losses: list[dict[str, Tensor]] = []
        self._keys: list[tuple[str, ...]] = []
        self._waited = 0.0
        self._started = time.perf_counter()

    def timed(self, batches: Iterable[WorkerBatch]) -> Iterator[WorkerBatch]:
        iterator = iter(batches)
        while True:
            start = time.perf_counter()
            batch = next(iterator, None)
            self._waited += time.perf_counter() - start
            if batch is None:
                return
            yield batch

    def add(self, losses: dict[str, Tensor], keys: tuple[str, ...]) -> None:
        self._losses.append(losses)
        self._keys.append(keys)

    def read(self) -> tuple[dict[str, float], list[_Step]]:
        """Return the metrics of the steps since the last call, and a list of these steps.

        Metrics are the losses by name (means over the steps and the workers), ``images_per_second`` of all workers together, and
        ``data_wait``, the fraction of time that this worker spent waiting for batches.
        """
        names = sorted(self._losses[0])
        # One row per step, one column per name.
        table = torch.stack([torch.stack([losses[name] for name in names]) for losses in self._losses])
        table = mean_over_workers(table)
        elapsed = time.perf_counter() - self._started
        metrics = dict(zip(names, table.mean(0).tolist(), strict=True))
        metrics["images_per_second"] = len(self._losses) * self._batch_size / elapsed
        metrics["data_wait"] = self._waited / elapsed
        steps = [
            _Step(dict(zip(names, row, strict=True)), keys)
            for row, keys in zip(table.tolist(), self._keys, strict=True)
        ]
        self._reset()
        return metrics, steps
