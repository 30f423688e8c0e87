"""Images/s of bulk segmentation and of training on one single-core node and on two of them.

Every node is a ``ray start`` that is bound, with its workers, to one core. The driver shares the core of the head node, as it
would on a machine of its own. So a node has exactly one core, and the ratio is the gain from a second machine. Photos, pairs and
results are in folders, so that no server uses a core. Rates are measured in the steady state: in bulk segmentation the photos
between the first 10 % and the last 5 % of those finished, as in ``benchmarks.bulk``; in training the median of the reports after
the first third. The ratio of the benchmark is that of bulk segmentation.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.bulk import CLASSES, photo_files, save_model, steady
from cli import console
from cluster.local_cluster import Host, LocalCluster
from vilseg import storage
from vilseg.config import RunConfig
from vilseg.data.shards import write_index, write_tar
from vilseg.data.synthetic import scenes
from vilseg.errors import ClusterError
from vilseg.training.metrics_log import read_metrics

CONFIG = Path(__file__).parent.parent / "configs" / "demo.yaml"
_PHOTOS = 1200
_PAIRS = 4_000
_BATCH, _STEPS, _LOG_EVERY = 128, 100, 5
_ROUNDS = 2


def main(out: Path) -> dict[str, Any]:
    """Run the benchmark.

    Args:
        out: folder for photos, pairs, model and results; replaced if it exists.

    Returns:
        ``ratio`` (bulk segmentation) and ``ratio_training`` (rate of two nodes over rate of one, medians of the rounds), and the
        rates of all rounds.

    Raises:
        ClusterError: this machine has fewer than two cores, or no command ``taskset`` to bind a node to a core.
    """
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if len(cores) < 2 or not shutil.which("taskset"):
        raise ClusterError("scaling needs two cores and the command taskset (of util-linux) to bind a node to each")
    out = out.absolute()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    os.environ["OMP_NUM_THREADS"] = "1"
    (out / "photos").mkdir()
    files = photo_files()
    for number in range(_PHOTOS):
        shutil.copyfile(files[number % len(files)], out / "photos" / f"{number:05d}.jpg")
    save_model(str(out / "model"))
    size = RunConfig.load(str(CONFIG), []).data.canvas
    drawn = scenes.pairs(_PAIRS, 0, size)
    members = ((pair.key, pair.image, "jpg", {"captions": list(pair.captions)}) for pair in drawn)
    write_index(str(out / "pairs"), [("0.tar", write_tar(f"{out}/pairs/0.tar", members))])
    rates: dict[str, dict[int, list[float]]] = {"bulk": {1: [], 2: []}, "training": {1: [], 2: []}}
    for number in range(_ROUNDS):
        for nodes in (1, 2):
            hosts = [Host(prefix=("taskset", "-c", str(core))) for core in cores[:nodes]]
            cluster = LocalCluster.start(out / "cluster", nodes, 1, hosts)
            try:
                for kind, found in rates.items():
                    place = str(out / f"{kind}-{nodes}-{number}")
                    found[nodes].append(_driver(cluster, hosts[0], f"run_{kind}({str(out)!r}, {place!r}, {nodes})"))
                    console.log(f"{kind} on {nodes} nodes: {found[nodes][-1]} images/s")
            finally:
                cluster.stop()
    ratios = {kind: round(median(found[2]) / median(found[1]), 4) for kind, found in rates.items()}
    return {
        "benchmark": "scaling",
        "ratio": ratios["bulk"],
        "ratio_training": ratios["training"],
        "images_per_second": {
            kind: {f"{nodes}_nodes": values for nodes, values in found.items()} for kind, found in rates.items()
        },
        "photos": _PHOTOS,
        "steps": _STEPS,
        "batch_size": _BATCH,
        "cpus": os.cpu_count(),
    }


def _driver(cluster: LocalCluster, host: Host, call: str) -> float:
    """Run a function of this file in a process of its own beside the head; returns the rate that it prints."""
    code = f"from benchmarks import scaling; scaling.{call}"
    environment = {**os.environ, **cluster.environment()}
    command = [*host.prefix, sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
    return float(json.loads(done.stdout.splitlines()[-1]))


def run_bulk(out: str, place: str, nodes: int) -> None:
    """Segment the photos, and print the rate in photos/s; called in the driver process."""
    from cluster.ray_session import ray_session
    from jobs.segment import segment_job
    from jobs.segment.plan import plan
    from vilseg.text.vocabulary import Vocabulary

    moments: list[float] = []

    def note(progress: segment_job.Progress) -> None:
        moments.extend([time.time()] * (progress.done - len(moments)))

    with ray_session("auto") as session:
        assert session.nodes == nodes
        job = plan([f"{out}/photos"], f"{out}/model", Vocabulary.of(CLASSES), place, formats=["png"])
        assert segment_job.main(job, session, progress=note).ok == _PHOTOS
    print(json.dumps(round(steady(moments), 2)))


def run_training(out: str, place: str, nodes: int) -> None:
    """Train with one worker per node, and print the rate in images/s; called in the driver process."""
    from cluster.ray_session import ray_session
    from jobs.train import train_job

    settings = [f"data.source={out}/pairs", f"trainer.storage={storage.parent(place)}", f"name={storage.name(place)}"]
    settings += [f"trainer.workers={nodes}", f"trainer.batch_size={_BATCH}", f"trainer.steps={_STEPS}"]
    settings += [f"trainer.log_every={_LOG_EVERY}", f"trainer.checkpoint_every={_STEPS}"]
    with ray_session("auto") as session:
        assert session.nodes == nodes
        done = train_job.main(RunConfig.load(str(CONFIG), settings), session)
    reports = [report["images_per_second"] for report in read_metrics(done.run_dir)]
    print(json.dumps(round(median(reports[len(reports) // 3 :]), 1)))
