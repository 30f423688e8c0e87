"""Peak memory of a step, measured in a process of its own: large batches by chunks, and activations computed again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
PROGRAM = """
import json, sys, torch
from vilseg.config import ModelConfig, OptimizerConfig, TrainerConfig, ViewsConfig
from vilseg.config.loss import LossConfig
from vilseg.data.batch_reader import WorkerBatch
from vilseg.model import ViLSeg
from vilseg.training.batch import TensorBatch
from vilseg.training.loop import Trainer
from vilseg.training.objective import Objective

names = ["thing%d" % i for i in range(100)]


def trainer_of(case):
    width = case["width"]
    model = {
        "image_encoder": {"architecture": "vit", "sizes": {
            "hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": 6, "num_attention_heads": 3,
            "image_size": 64, "patch_size": 8}},
        "text_encoder": {"sizes": {"num_hidden_layers": 2}, "max_tokens": 16},
        "embedding_dim": 128,
    }
    torch.manual_seed(0)
    objective = Objective(
        ViLSeg.from_config(ModelConfig.model_validate(model), names), LossConfig(nouns={"top_patches": 4}),
        ViewsConfig(global_size=64, local_size=32), tuple(names),
    ).train()
    settings = TrainerConfig(batch_size=case["batch"], steps=2, **case["settings"])
    return Trainer(objective, OptimizerConfig(), settings, torch.device("cpu"))


def batch(trainer, count):
    phrases = torch.full((count, 32), -1)
    phrases[:, 0] = torch.arange(count) % len(names)
    tokens = trainer.objective.model.text_encoder.tokenize([names[i % len(names)] for i in range(count)])
    images = torch.randint(0, 256, (count, 64, 64, 3), dtype=torch.uint8)
    return TensorBatch(images, tokens, phrases, torch.arange(count), tuple("k" * count))


def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024


found = []
for case in json.loads(sys.argv[1]):
    torch.set_num_threads(case["threads"])
    trainer = trainer_of(case)
    made = batch(trainer, case["batch"])
    trainer.train_step(batch(trainer, 2))  # everything that is made once: gradients, the optimiser's state
    open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
    before = peak()
    trainer.train_step(made)
    found.append(peak() - before)
print(json.dumps(found))
"""


def case(batch: int, *, width: int = 48, threads: int = 1, **settings: Any) -> dict[str, Any]:
    return {"batch": batch, "width": width, "threads": threads, "settings": settings}


def megabytes(cases: list[dict[str, Any]]) -> list[float]:
    """Peak resident memory that a step of each case takes over what lies there before it."""
    # Every larger tensor goes back to the system at once, so that the peak is what is in use.
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(cases)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    return json.loads(done.stdout.splitlines()[-1])


if_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@if_linux
def test_chunks_and_activations_computed_again_take_little_memory() -> None:
    cases = [
        case(16),
        case(128, chunk_size=16),
        case(128),
        case(32),
        case(32, checkpoint_activations=True),
    ]
    chunk, by_chunks, at_once, kept, again = megabytes(cases)
    assert by_chunks < 1.3 * chunk
    assert at_once > 4 * chunk, "the whole batch at once must be what chunks save"
    assert again < 0.6 * kept


@pytest.mark.slow
@pytest.mark.timeout(1800)
@if_linux
def test_1024_by_chunks_of_64_take_about_the_memory_of_64() -> None:
    threads = os.cpu_count() or 1
    small, large = megabytes(
        [case(64, width=192, threads=threads), case(1024, width=192, threads=threads, chunk_size=64)]
    )
    assert large < 1.3 * small
