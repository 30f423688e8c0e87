"""Comparison of training with another commit, bit for bit, to show that a refactoring changed nothing.

The working tree and a checkout of the commit train side by side on the same pairs with the demo's configuration, one worker and
float32, each in a subprocess with a Ray of its own. Module names may differ between the trees, so only their common interface is
used: the command line, the configuration keys and ``metrics.jsonl``. Every reported metric of the first 50 steps is compared.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from benchmarks import scene_runs
from cli import console
from jobs.train.supervisor import sigterm_as_ctrl_c
from vilseg.errors import UserError

_ROOT = Path(__file__).parent.parent
_STEPS = 50
_PAIRS, _SHARD = 1200, 300
"""Fewer pairs than 50 steps of the demo's batch size read, so that a second epoch begins."""
_SHUTDOWN_S = 60.0
_TIMED = {"images_per_second", "data_wait"}
"""Metrics that depend on the machine."""

_NO_LOSS = tuple(f"loss.{name}.weight=0" for name in ("cross_modal", "nouns", "vision", "mutual_information"))
_CAPTIONS = (*_NO_LOSS, "loss.cross_modal.weight=1")
_PATCHES = (*_CAPTIONS, "loss.cross_modal.patch_share=0.5")
_VISION = (*_NO_LOSS, "loss.vision.weight=1")
_CLUSTERS = (*_NO_LOSS, "loss.mutual_information.weight=1")
_ALL = (
    "loss.cross_modal.patch_share=0.5",
    "loss.vision.weight=0.1",
    "loss.mutual_information.train_encoder=true",
    "loss.mutual_information.overclusters=40",
)
_CASES: dict[str, tuple[str, ...]] = {
    "captions, infonce": _CAPTIONS,
    "captions and patches, softmax": (*_PATCHES, "loss.cross_modal.patch_pooling=softmax"),
    "captions and patches, mean": (*_PATCHES, "loss.cross_modal.patch_pooling=mean"),
    "captions and patches, sigmoid": (*_PATCHES, "loss.cross_modal.form=sigmoid"),
    "nouns": (*_NO_LOSS, "loss.nouns.weight=1"),
    "vision, dino": (*_VISION, "loss.vision.form=dino"),
    "vision, infonce": (*_VISION, "loss.vision.form=infonce"),
    "clusters, encoder too": (*_CLUSTERS, "loss.mutual_information.train_encoder=true"),
    "clusters, head alone": (*_CLUSTERS, "loss.mutual_information.train_encoder=false"),
    "clusters, two heads": (
        *_CLUSTERS,
        "loss.mutual_information.train_encoder=true",
        "loss.mutual_information.overclusters=40",
    ),
    "all": _ALL,
    "all, by chunks": (*_ALL, "trainer.chunk_size=4"),
    "all, self-training": (*_ALL, "stage=self-train", "init={runs}/all", "loss.self_training.confidence=1"),
    "all, cached features": (
        *_ALL,
        "model.image_encoder.frozen=true",
        "views.feature_dropout=0.5",
        "data.feature_cache={runs}/features",
    ),
}
"""Overrides of the demo's configuration; ``{runs}`` is the folder of the tree's runs."""


def main(out: Path, *, against: str = "HEAD") -> dict[str, Any]:
    """Train with both trees and compare their metrics.

    Args:
        out: folder for the metrics and a log of each tree; emptied first.
        against: commit to compare with. The working tree is compared including its uncommitted changes.

    Returns:
        ``equal``, ``ratio`` (1 if the metrics of all trainings are equal, else 0), and ``cases`` by name of the training:
        ``equal``, ``steps``, ``first_difference`` (None, or the step, the name of the metric and its value in each tree),
        ``last_loss`` and ``sha256`` (of all metrics) of the working tree, and ``seconds`` that the slower tree took.

    Raises:
        UserError: the commit does not exist, or a tree could not be started.
    """
    out = out.absolute()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    with (
        sigterm_as_ctrl_c(),  # or neither checkout nor trainings would end with this
        tempfile.TemporaryDirectory(prefix="vilseg-parity-") as scratch,
        _trees(Path(scratch), against) as trees,
    ):
        console.log("[pairs]")
        config = scene_runs.config(Path(scratch))
        scene_runs.write_pairs(f"{scratch}/pairs", _PAIRS, _SHARD, config.data.canvas)
        done = _train(trees, Path(scratch), out)
    cases = {name: _compare(*(of[name] for of in done)) for name in _CASES}
    equal = all(case["equal"] for case in cases.values())
    return {
        "benchmark": "loss_parity",
        "against": _git("rev-parse", "--short", against).strip(),
        "equal": equal,
        "ratio": float(equal),
        "cases": cases,
    }


# ------------------------------------------------------------------------------------------------------------- trees


@contextmanager
def _trees(scratch: Path, against: str) -> Iterator[tuple[Path, Path]]:
    """Folders with the working tree as it is now, which may be edited while this runs, and with the commit."""
    working, reference = scratch / "working", scratch / "reference"
    for name in _git("ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0"):
        source = _ROOT / name
        if name and source.is_file():  # not where it was removed and this is not committed yet
            (working / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, working / name)
    _git("worktree", "add", "--quiet", "--detach", str(reference), against)
    try:
        yield working, reference
    finally:
        _git("worktree", "remove", "--force", str(reference))


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(_ROOT), *arguments], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"git {arguments[0]} failed: {done.stderr.strip()}")
    return done.stdout


# ---------------------------------------------------------------------------------------------------------- trainings


def _train(trees: Sequence[Path], scratch: Path, out: Path) -> list[dict[str, Any]]:
    """Train by all trees at once; for each and by case the ``exit`` code, ``seconds`` and ``reports``, the lines of
    metrics.jsonl."""
    program = Path(__file__).with_name("loss_parity_tree.py").read_text()
    with ExitStack() as ended, ThreadPoolExecutor(len(trees)) as pool:
        followed = []
        for tree in trees:
            kept, runs = out / tree.name, scratch / f"runs-{tree.name}"
            kept.mkdir()
            process = subprocess.Popen(
                [sys.executable, "-c", program],
                cwd=tree,
                env=_environment(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=ended.enter_context((kept / "log").open("w")),
                text=True,
            )
            ended.callback(_end, process)
            requests = [{"name": name, "arguments": _arguments(name, scratch, runs)} for name in _CASES]
            followed.append(pool.submit(_follow, process, requests, runs, kept))
        try:
            for future in as_completed(followed):
                future.result()
        except BaseException:
            ended.close()  # or the pool would wait for the other tree
            raise
        return [future.result() for future in followed]


def _end(process: subprocess.Popen[str]) -> None:
    """End a tree's process, if it has not ended by itself; a training that runs makes a checkpoint first."""
    process.terminate()
    try:
        process.wait(_SHUTDOWN_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _follow(
    process: subprocess.Popen[str], requests: list[dict[str, Any]], runs: Path, kept: Path
) -> dict[str, dict[str, Any]]:
    """Keep the metrics of every training as it ends, and return them."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("".join(json.dumps(request) + "\n" for request in requests))
    process.stdin.close()
    found: dict[str, dict[str, Any]] = {}
    for line in process.stdout:
        done = json.loads(line)
        name = done["name"]
        metrics = runs / _run_name(name) / "metrics.jsonl"
        text = metrics.read_text() if metrics.exists() else ""
        (kept / f"{_run_name(name)}.jsonl").write_text(text)
        found[name] = {**done, "reports": [json.loads(report) for report in text.splitlines()]}
        console.log(f"{kept.name}: {name}, {done['seconds']:.0f} s" + (", FAILED" if done["exit"] else ""))
    if len(found) < len(requests):
        raise UserError(f"the trainings of the {kept.name} tree ended too early; see {kept / 'log'}")
    return found


def _run_name(case: str) -> str:
    return case.replace(",", "").replace(" ", "-")


def _arguments(case: str, scratch: Path, runs: Path) -> list[str]:
    """The arguments of ``vilseg`` for a case; the configuration is the working tree's for both."""
    overrides = {
        "data.source": scratch / "pairs",
        "trainer.storage": runs,
        "trainer.workers": 1,
        "trainer.steps": _STEPS,
        "trainer.log_every": 1,
        "trainer.precision": "float32",
        "trainer.seed": 0,
    }
    config = scratch / "working" / scene_runs.CONFIG.relative_to(_ROOT)
    return [
        *("train", "--config", str(config), "--name", _run_name(case)),
        *(f"{key}={value}" for key, value in overrides.items()),
        *(override.format(runs=runs) for override in _CASES[case]),
    ]


def _environment() -> dict[str, str]:
    """The variables of a tree's process."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONDONTWRITEBYTECODE", "RAY_ADDRESS")}
    return {
        **kept,
        "OMP_NUM_THREADS": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        # What starting costs is most of the time here: processes that read pairs are kept for the next training, and none is
        # begun that looks out for machines about to be taken away. On a busy machine a worker may take long to come.
        "RAY_num_workers_soft_limit": "8",
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "600",
    }


# --------------------------------------------------------------------------------------------------------- comparison


def _compare(working: dict[str, Any], reference: dict[str, Any]) -> dict[str, Any]:
    """The result of a case; equal only where both trees made all steps."""
    ours, theirs = _metrics(working["reports"]), _metrics(reference["reports"])
    different = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
    first: dict[str, Any] | None = None
    if different:
        step, name = different[0]
        values = {"working": ours.get(different[0]), "reference": theirs.get(different[0])}
        first = {"step": step, "name": name} | {k: v and float.fromhex(v) for k, v in values.items()}
    elif working["exit"] or reference["exit"]:
        first = {"name": "exit code", "working": working["exit"], "reference": reference["exit"]}
    steps = [report["step"] for report in working["reports"]]
    text = "".join(f"{step} {name} {value}\n" for (step, name), value in sorted(ours.items()))
    return {
        "equal": first is None and steps == list(range(1, _STEPS + 1)),
        "steps": len(steps),
        "first_difference": first,
        "last_loss": working["reports"][-1]["loss"] if steps else None,
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
        "seconds": max(working["seconds"], reference["seconds"]),
    }


def _metrics(reports: list[dict[str, float]]) -> dict[tuple[int, str], str]:
    """Every figure by step and name, in hexadecimal, which has all bits and tells -0 from 0."""
    return {
        (int(report["step"]), name): float(value).hex()
        for report in reports
        for name, value in report.items()
        if name not in _TIMED
    }
