"""Training on GPUs: precision, augmentation, copies during computation, the fused optimiser, several GPUs together."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

from tests.unit.training import test_loop
from tests.unit.training.test_loop import batches, data_parallel, losses, write_run
from tests.unit.training.test_objective import LOSSES, PHRASES, VIEWS, batch_for, loss_config
from tests.unit.training.test_prefetch import numbered
from vilseg.data.views import make_views
from vilseg.device import precision_dtype
from vilseg.distributed import rank
from vilseg.model import ViLSeg
from vilseg.training.fsdp import apply_fsdp
from vilseg.training.loop import Trainer
from vilseg.training.objective import Objective
from vilseg.training.prefetch import copy_to_device

GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not GPUS, reason="there is no CUDA device on this machine")]
Make = Callable[..., ViLSeg]


@pytest.fixture(autouse=True)
def exact_matrices() -> Iterator[None]:
    """Turn TF32 off, because it would be the largest difference between CPU and GPU."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def to_gpu(batch: Any) -> Any:
    moved = {name: getattr(batch, name).cuda() for name in ("images", "tokens", "phrases", "seeds")}
    return type(batch)(**moved, keys=batch.keys)


def make_trainer(folder: str, device: torch.device, steps: int, sharding: str = "none") -> Trainer:
    wrap = apply_fsdp if sharding == "fsdp" else data_parallel
    return test_loop.make_trainer(folder, steps, device=device, wrap=wrap, gradient_clip=0.05)


def train(folder: str, device: torch.device, sharding: str = "none") -> tuple[list[dict[str, float]], dict[str, Any]]:
    trainer = make_trainer(folder, device, 4, sharding)
    reports: list[dict[str, float]] = []
    trainer.train(batches(folder, 0, 4), on_report=reports.append, on_checkpoint=lambda: None)
    objective = trainer.state_dict()["objective"]
    return losses(reports), {name: None if value is None else value.cpu().numpy() for name, value in objective.items()}


def test_views_are_the_same_on_both_devices(make_model: Make) -> None:
    batch = batch_for(make_model())
    here = make_views(batch.images, batch.seeds, VIEWS, global_crops=2, local_crops=2)
    there = make_views(batch.images.cuda(), batch.seeds.cuda(), VIEWS, global_crops=2, local_crops=2)
    assert there.global_GB3HW.is_cuda
    assert there.local_LB3HW.is_cuda
    np.testing.assert_allclose(there.geometry_GB23.cpu(), here.geometry_GB23, atol=1e-5)
    np.testing.assert_allclose(there.global_GB3HW.cpu(), here.global_GB3HW, atol=1e-3)
    np.testing.assert_allclose(there.local_LB3HW.cpu(), here.local_LB3HW, atol=1e-3)


def test_losses_are_the_same_on_both_devices(make_model: Make) -> None:
    here = Objective(make_model(), loss_config(*LOSSES), VIEWS, PHRASES).eval()
    batch = batch_for(here.model)
    expected = {name: value.item() for name, value in here(batch).items()}
    there = Objective(make_model(), loss_config(*LOSSES), VIEWS, PHRASES).eval().cuda()
    found = {name: value.item() for name, value in there(to_gpu(batch)).items()}
    assert found == pytest.approx(expected, abs=1e-3)


def test_a_step_in_bfloat16_stays_near_float32_and_keeps_weights_whole(make_model: Make) -> None:
    assert precision_dtype("auto", torch.device("cuda")) in (torch.bfloat16, torch.float32)
    values, gradients = [], []
    for dtype in (torch.float32, torch.bfloat16):
        objective = Objective(make_model(), loss_config(*LOSSES), VIEWS, PHRASES, autocast=dtype).cuda().train()
        result = objective(to_gpu(batch_for(objective.model)))
        result["loss"].backward()
        assert all(value.dtype == torch.float32 for value in result.values())
        assert all(p.dtype == torch.float32 for p in objective.parameters())
        values.append({name: value.item() for name, value in result.items()})
        weight = objective.model.image_projection.weight.grad
        assert weight is not None
        gradients.append(weight.flatten())
    assert values[1] == pytest.approx(values[0], abs=0.05)
    assert values[0] != values[1]
    assert torch.cosine_similarity(*gradients, dim=0) > 0.98


def test_a_run_on_the_gpu_is_the_run_on_the_cpu(tmp_path: Path, make_model: Make) -> None:
    folder = write_run(tmp_path, make_model, dropout=0)
    expected, _ = train(folder, torch.device("cpu"))
    found, _ = train(folder, torch.device("cuda"))
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, abs=2e-3)


def test_the_optimiser_is_fused_and_its_state_resumes(tmp_path: Path, make_model: Make) -> None:
    folder = write_run(tmp_path, make_model, dropout=0)
    trainer = make_trainer(folder, torch.device("cuda"), 2)
    assert trainer._adamw.defaults["fused"]
    trainer.train(batches(folder, 0, 2), on_report=lambda metrics: None, on_checkpoint=lambda: None)
    again = make_trainer(folder, torch.device("cuda"), 4)
    again.load_state_dict(trainer.state_dict())
    before = [parameter.detach().clone() for parameter in again.objective.parameters() if parameter.requires_grad]
    again.train(batches(folder, 2, 4), on_report=lambda metrics: None, on_checkpoint=lambda: None)
    after = [parameter for parameter in again.objective.parameters() if parameter.requires_grad]
    assert again.step == 4
    assert any(not torch.equal(old, new) for old, new in zip(before, after, strict=True))


def test_the_next_batch_is_copied_before_the_present_one_is_worked_on() -> None:
    device = torch.device("cuda")
    read: list[int] = []
    for number, batch in enumerate(copy_to_device(numbered(5, read), device)):
        assert read == list(range(min(5, number + 2))), "one ahead"
        # Enough work that a copy which did not wait its turn would be seen.
        noise = torch.randn(2000, 2000, device=device)
        for _ in range(20):
            noise = noise @ noise / 50
        assert batch.images.device.type == "cuda"
        assert bool((batch.images == number).all())
        assert bool((batch.tokens == number).all())
        assert batch.keys == (f"{number}a", f"{number}b")
    assert read == list(range(5))


def test_of_no_batches_come_none() -> None:
    assert list(copy_to_device(numbered(0, []), torch.device("cuda"))) == []


def _worker(number: int, count: int, port: int, folder: str, sharding: str) -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.cuda.set_device(number)
    dist.init_process_group("nccl", init_method=f"tcp://127.0.0.1:{port}", rank=number, world_size=count)
    try:
        reports, state = train(folder, torch.device("cuda", number), sharding)
        if rank() == 0:
            torch.save(
                (reports, {name: torch.from_numpy(value) for name, value in state.items()}), f"{folder}/{sharding}"
            )
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("sharding", ["none", "fsdp"])
def test_all_gpus_together_train_as_one(tmp_path: Path, make_model: Make, sharding: str) -> None:
    """Train on all GPUs through NCCL and on one, with equal results; a machine with one GPU has a group of one."""
    count = max(n for n in (1, 2, 4, 8) if n <= GPUS)
    folder = write_run(tmp_path, make_model, dropout=0)
    alone, expected = train(folder, torch.device("cuda", 0))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(_worker, (count, port, folder, sharding), nprocs=count)
    reports, state = torch.load(f"{folder}/{sharding}", weights_only=True)
    for one, other in zip(reports, alone, strict=True):
        assert one == pytest.approx(other, abs=1e-3)
    for name, value in expected.items():
        np.testing.assert_allclose(state[name], value, atol=5e-3, err_msg=name)
