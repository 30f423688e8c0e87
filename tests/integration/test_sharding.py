"""Weights cut among workers: the losses, gradients and states of whole copies, and checkpoints that fit any of them."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tests.unit.training.test_loop import BATCH, NAMES, batches, data_parallel, losses, write_run
from vilseg.config import OptimizerConfig, TrainerConfig, ViewsConfig
from vilseg.config.loss import LossConfig
from vilseg.distributed import world_size
from vilseg.model import ViLSeg
from vilseg.training.fsdp import apply_fsdp, clip_gradient_norm, local_shard
from vilseg.training.loop import Trainer
from vilseg.training.objective import Objective

Make = Callable[..., ViLSeg]
Pool = Callable[..., list[Any]]
TRANSFORMER = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
ENCODERS: dict[str, dict[str, Any]] = {
    "vit": {"architecture": "vit", "sizes": {**TRANSFORMER, "image_size": 16, "patch_size": 8}},
    "local_conv": {"sizes": {"width": 16, "depth": 1}},
}
DETERMINISTIC = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def write(folder: Path, make_model: Make, encoder: str) -> str:
    write_run(folder, make_model, dropout=0)
    text = {"sizes": {**TRANSFORMER, **DETERMINISTIC}, "max_tokens": 12}
    make_model(image_encoder=ENCODERS[encoder], text_encoder=text).save_pretrained(f"{folder}/initial")
    return str(folder)


def make_trainer(folder: str, steps: int, sharding: str, clip: float = 0.0) -> Trainer:
    loss = {
        "vision": {"weight": 0.5, "prototypes": 16, "hidden_dim": 16, "teacher_momentum": 0.5},
        "mutual_information": {"weight": 0.5},
        "nouns": {"top_patches": 3},
    }
    torch.manual_seed(1)
    objective = Objective(
        ViLSeg.from_pretrained(f"{folder}/initial"),
        LossConfig.model_validate(loss),
        ViewsConfig(global_size=16, local_size=8),
        NAMES,
    )
    return Trainer(
        objective,
        OptimizerConfig(learning_rate=1e-3, warmup_steps=2, gradient_clip=clip),
        TrainerConfig(workers=world_size(), batch_size=BATCH, steps=steps, log_every=1),
        torch.device("cpu"),
        wrap=apply_fsdp if sharding == "fsdp" else data_parallel,
    )


def as_arrays(state: Any) -> Any:
    if isinstance(state, dict):
        return {name: as_arrays(value) for name, value in state.items()}
    if isinstance(state, (list, tuple)):
        return [as_arrays(value) for value in state]
    return state.numpy().copy() if isinstance(state, Tensor) else state


def packed(state: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def train(
    folder: str, sharding: str, clip: float = 0.0, state: bytes | None = None, until: int = 4
) -> tuple[list[dict[str, float]], Any, bytes]:
    """Losses of every step, and the state at the end, as arrays and as a checkpoint has it."""
    trainer = make_trainer(folder, 6, sharding, clip)
    if state is not None:
        trainer.load_state_dict(torch.load(io.BytesIO(state), weights_only=True))
    reports: list[dict[str, float]] = []
    trainer.train(
        batches(folder, trainer.step, 6),
        on_report=reports.append,
        on_checkpoint=lambda: None,
        should_stop=lambda: trainer.step == until,
    )
    left = trainer.state_dict()
    return losses(reports), as_arrays(left), packed(left)


def assert_same(found: Any, expected: Any, tolerance: float, name: str = "") -> None:
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), name
        for key, value in expected.items():
            assert_same(found[key], value, tolerance, f"{name}.{key}")
    elif isinstance(expected, list):
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other, tolerance, name)
    # A bias of all keys alike changes nothing, so its gradient is rounding, which AdamW brings to full size.
    elif not name.endswith(("k_proj.bias", "key.bias")):
        np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance, err_msg=name)


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_cut_weights_train_as_whole_ones(
    tmp_path: Path, make_model: Make, on_two_workers: Pool, encoder: str, clip: float
) -> None:
    folder = write(tmp_path, make_model, encoder)
    (expected, state, _), (_, _, _) = on_two_workers(train, folder, "none", clip)
    assert len(expected) == 4
    assert {"loss", "loss/vision"} <= expected[0].keys()
    (first, cut_state, _), (second, of_second, _) = on_two_workers(train, folder, "fsdp", clip)
    assert first == second, "every worker reports the mean over all"
    for one, other in zip(first, expected, strict=True):
        assert one == pytest.approx(other, rel=1e-6, abs=1e-6)
    # AdamW enlarges the rounding of small gradients, by an amount that depends on the processor: 2e-6 of steps of 1e-3 was seen.
    assert_same(cut_state["objective"], state["objective"], 5e-6)
    # Second moments are small: they are compared by their roots.
    for index, moments in state["optimizer"]["state"].items():
        found = cut_state["optimizer"]["state"][index]
        assert found["step"] == moments["step"] == 4
        assert_same(found["exp_avg"], moments["exp_avg"], 5e-6)
        assert_same(np.sqrt(found["exp_avg_sq"]), np.sqrt(moments["exp_avg_sq"]), 1e-5)
    assert any(value is None for value in of_second["objective"].values()), "the first worker alone has it whole"


@pytest.mark.parametrize(("before", "after"), [("fsdp", "fsdp"), ("fsdp", "none"), ("none", "fsdp")])
def test_a_checkpoint_goes_on_either_way(
    tmp_path: Path, make_model: Make, on_two_workers: Pool, before: str, after: str
) -> None:
    folder = write(tmp_path, make_model, "vit")
    unbroken, expected, _ = train(folder, "none", until=6)
    kept = on_two_workers(train, folder, before, 0.0, None, 3)[0][2]
    (rest, state, _), _ = on_two_workers(train, folder, after, 0.0, kept, 6)
    assert len(rest) == 3
    for one, other in zip(rest, unbroken[3:], strict=True):
        assert one == pytest.approx(other, abs=1e-5)
    assert_same(state["objective"], expected["objective"], 1e-4)


@pytest.mark.parametrize("sharding", ["fsdp", "none"])
def test_a_checkpoint_of_one_number_of_workers_fits_another(
    tmp_path: Path, make_model: Make, on_two_workers: Pool, sharding: str
) -> None:
    folder = write(tmp_path, make_model, "vit")
    unbroken, expected, _ = train(folder, "none", until=6)
    of_two = on_two_workers(train, folder, "fsdp", 0.0, None, 3)[0][2]
    rest, state, _ = train(folder, sharding, 0.0, of_two, 6)
    assert [report["loss"] for report in rest] == pytest.approx([r["loss"] for r in unbroken[3:]], abs=1e-5)
    assert_same(state["objective"], expected["objective"], 1e-4)
    of_one = train(folder, sharding, 0.0, None, 3)[2]
    (rest, state, _), _ = on_two_workers(train, folder, "fsdp", 0.0, of_one, 6)
    assert [report["loss"] for report in rest] == pytest.approx([r["loss"] for r in unbroken[3:]], abs=1e-5)
    assert_same(state["objective"], expected["objective"], 1e-4)


def held_by_a_worker(folder: str) -> dict[str, int]:
    trainer = make_trainer(folder, 1, "fsdp")
    parameters = list(trainer.objective.parameters())
    trainer.train(batches(folder, 0, 1), on_report=lambda metrics: None, on_checkpoint=lambda: None)
    optimizer = [value for of in trainer._adamw.state.values() for value in of.values() if value.ndim]
    layers = [m for m in trainer.objective.modules() if type(m).__name__.endswith(("ViTLayer", "BertLayer"))]
    return {
        "all": sum(parameter.numel() for parameter in parameters),
        "here": sum(local_shard(parameter).numel() for parameter in trainer.objective.parameters()),
        "optimised": sum(p.numel() for p in trainer.objective.parameters() if p.requires_grad),
        "moments": sum(local_shard(value).numel() for value in optimizer),
        "layers": len(layers),
        "layers alone": sum(type(layer).__name__.startswith("FSDP") for layer in layers),
        "teacher cut": sum(isinstance(p, DTensor) for p in trainer.objective.teacher.parameters()),  # type: ignore[union-attr]
        "teacher": sum(1 for _ in trainer.objective.teacher.parameters()),  # type: ignore[union-attr]
    }


def test_every_worker_holds_its_share_of_everything(tmp_path: Path, make_model: Make, on_two_workers: Pool) -> None:
    folder = write(tmp_path, make_model, "vit")
    held = on_two_workers(held_by_a_worker, folder)
    for worker in held:
        assert worker["all"] > 5000
        assert worker["here"] == pytest.approx(worker["all"] / 2, rel=0.02)
        assert worker["moments"] == pytest.approx(worker["optimised"], rel=0.05), "two of them, half of each"
        assert worker["teacher cut"] == worker["teacher"] > 0
        assert worker["layers alone"] == worker["layers"] == 6, "of two towers and the teacher"
    assert sum(worker["here"] for worker in held) >= held[0]["all"]


def saved_by_workers(folder: str) -> None:
    trainer = make_trainer(folder, 1, "fsdp")
    trainer.train(batches(folder, 0, 1), on_report=lambda metrics: None, on_checkpoint=lambda: None)
    weights = trainer.model_weights()
    if torch.distributed.get_rank() == 0:
        trainer.objective.model.save_pretrained(f"{folder}/model", weights=weights)


def test_the_first_worker_saves_the_model_whole(tmp_path: Path, make_model: Make, on_two_workers: Pool) -> None:
    folder = write(tmp_path, make_model, "vit")
    alone = make_trainer(folder, 1, "none")
    alone.train(batches(folder, 0, 1), on_report=lambda metrics: None, on_checkpoint=lambda: None)
    on_two_workers(saved_by_workers, folder)
    saved = ViLSeg.from_pretrained(f"{folder}/model").state_dict()
    assert_same(dict(saved), dict(alone.objective.model.state_dict()), 1e-5)


class Small(nn.Module):
    """A matrix with an odd number of rows, and a scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return (self.linear(x) * self.scale.exp()).square().sum()


def clipped_and_stepped(fused: bool) -> dict[str, np.ndarray]:
    """Gradients after clipping and weights after two steps, of the mean over workers."""
    torch.manual_seed(0)
    module = apply_fsdp(Small())
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, fused=fused)
    data = torch.randn(2, 4, 5, 4)
    results: dict[str, np.ndarray] = {}
    for step in range(2):
        optimizer.zero_grad()
        if world_size() == 1:
            (sum(module(part) for part in data[step].chunk(2)) / 2).backward()
        else:
            module(data[step].chunk(2)[torch.distributed.get_rank()]).backward()
        clip_gradient_norm(module.parameters(), 0.5)
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None
            gradient = parameter.grad
            results[f"{step} {name}"] = (gradient.full_tensor() if isinstance(gradient, DTensor) else gradient).numpy()
        optimizer.step()
    for name, parameter in module.named_parameters():
        results[name] = (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach().numpy()
    return results


@pytest.mark.parametrize("fused", [False, True])
def test_clipping_and_optimiser_take_cut_and_whole_weights_together(on_two_workers: Pool, fused: bool) -> None:
    alone = clipped_and_stepped(fused)
    norms = [sum(np.square(alone[f"0 {name}"]).sum() for name in ("linear.weight", "linear.bias", "scale"))]
    assert np.sqrt(norms[0]) == pytest.approx(0.5, rel=1e-4), "the clipping does something"
    for worker in on_two_workers(clipped_and_stepped, fused):
        assert_same(worker, alone, 1e-6)


def test_one_worker_alone_keeps_what_it_has() -> None:
    module = Small()
    assert apply_fsdp(module) is module
    assert not any(isinstance(parameter, DTensor) for parameter in module.parameters())
