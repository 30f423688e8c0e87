"""Ctrl-C during `vilseg train` leaves a checkpoint that `--resume` goes on from."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from vilseg.data.shards import write_tar
from vilseg.data.synthetic import scenes
from vilseg.training.run_dir import RunDirectory

ROOT = Path(__file__).parents[2]
STEPS = 100_000  # more than anybody waits for


def test_interrupted_training_resumes(tmp_path: Path, vilseg: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    drawn = ((pair.key, pair.image, "jpg", {"captions": pair.captions}) for pair in scenes.pairs(200, 0, 32))
    write_tar(str(tmp_path / "pairs" / "0.tar"), drawn)
    config = tmp_path / "run.yaml"
    config.write_text(
        f"""
        data: {{source: {tmp_path / "pairs"}, canvas: 32}}
        views: {{global_size: 32, local_size: 16}}
        model:
          image_encoder: {{sizes: {{width: 16, depth: 1}}}}
          text_encoder: {{sizes: {{hidden_size: 16, num_hidden_layers: 0, num_attention_heads: 1}}, max_tokens: 16}}
          embedding_dim: 16
        loss: {{vision: {{weight: 0}}, nouns: {{min_count: 2}}}}
        trainer: {{batch_size: 8, steps: {STEPS}, checkpoint_every: {STEPS}, log_every: 1, storage: {tmp_path / "runs"}}}
        """
    )
    arguments = ["train", "--config", str(config), "--name", "it"]
    process = subprocess.Popen(
        [sys.executable, "-m", "cli.app", *arguments, "trainer.log_every=5"],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        start_new_session=True,  # a group of its own, as a terminal makes, and Ctrl-C reaches every process in it
    )
    assert process.stderr is not None
    folder = RunDirectory(str(tmp_path / "runs" / "it"))
    try:
        for line in process.stderr:
            if line.startswith("step "):
                os.killpg(process.pid, signal.SIGINT)
                break
        said = process.stderr.read()
        assert process.wait(timeout=120) == 130, said
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert "--resume" in said
    assert len(folder.checkpoint_steps()) == 1, said
    (stopped,) = folder.checkpoint_steps()
    assert 5 <= stopped < STEPS
    done = vilseg(*arguments, "--resume", f"trainer.steps={stopped + 3}")
    assert done.returncode == 0, done.stderr
    assert folder.checkpoint_steps()[-1] == stopped + 3
    assert (tmp_path / "runs" / "it" / "model" / "model.safetensors").exists()
