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
from vilseg.config import LossConfig, ModelConfig, OptimizerConfig, TrainerConfig, ViewsConfig
from vilseg.data.stream import WorkerBatch
from vilseg.model import ViLSeg
from vilseg.training.batch import TensorBatch
from vilseg.training.loop import Trainer
from vilseg.training.objective import Objective

case = json.loads(sys.argv[1])
torch.set_num_threads(case["threads"])
names = ["thing%d" % i for i in range(100)]
model = {
    "image_encoder": {"architecture": "vit", "sizes": {
        "hidden_size": case["width"], "intermediate_size": 4 * case["width"], "num_hidden_layers": 6, "num_attention_heads": 3,
        "image_size": 64, "patch_size": 8}},
    "text_encoder": {"sizes": {"num_hidden_layers": 2}, "max_tokens": 16},
    "embedding_dim": 128,
}
torch.manual_seed(0)
objective = Objective(
    ViLSeg.from_config(ModelConfig.model_validate(model), names), LossConfig(nouns={"top_patches": 4}),
    ViewsConfig(global_size=64, local_size=32), tuple(names),
)
settings = TrainerConfig(batch_size=case["batch"], steps=2, **case["settings"])
trainer = Trainer(objective, OptimizerConfig(), settings, torch.device("cpu"))


def batch(count):
    phrases = torch.full((count, 32), -1)
    phrases[:, 0] = torch.arange(count) % len(names)
    tokens = objective.model.text_encoder.tokenize([names[i % len(names)] for i in range(count)])
    images = torch.randint(0, 256, (count, 64, 64, 3), dtype=torch.uint8)
    return TensorBatch(images, tokens, phrases, torch.arange(count), tuple("k" * count))


def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024


objective.train()
made = batch(case["batch"])
trainer._optimise(batch(2))  # everything that is made once: gradients, the optimiser's state
open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
before = peak()
trainer._optimise(made)
print(json.dumps({"before": before, "step": peak() - before}))
"""


def megabytes(batch: int, *, width: int, threads: int = 1, **settings: Any) -> float:
    """Peak resident memory that a step takes over what lies there before it."""
    case = {"batch": batch, "width": width, "threads": threads, "settings": settings}
    # Every larger tensor goes back to the system at once, so that the peak is what is in use.
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(case)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    print(batch, settings, found)
    return found["step"]


if_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@if_linux
def test_a_batch_by_chunks_takes_about_the_memory_of_one_chunk() -> None:
    small, large = megabytes(16, width=48), megabytes(128, width=48, chunk_size=16)
    assert large < 1.3 * small
    assert megabytes(128, width=48) > 4 * small, "the whole batch at once must be what chunks save"


@pytest.mark.slow
@if_linux
def test_1024_by_chunks_of_64_take_about_the_memory_of_64() -> None:
    small = megabytes(64, width=192, threads=os.cpu_count() or 1)
    assert megabytes(1024, width=192, threads=os.cpu_count() or 1, chunk_size=64) < 1.3 * small


@if_linux
def test_activations_that_are_computed_again_are_not_kept() -> None:
    kept, again = megabytes(32, width=48), megabytes(32, width=48, checkpoint_activations=True)
    assert again < 0.6 * kept
