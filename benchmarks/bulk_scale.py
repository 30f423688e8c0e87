"""Overhead of `vilseg segment` (listing and bookkeeping) for up to a million images.

The images are 8 x 8 pixels, and the configuration key ``model.image_encoder.factory`` selects an encoder with constant output,
so that little but reading remains. The overhead per image is (T - B) cores / images, where T is the time of a whole job without
its start, and B the time of a bare loop, in one process per core, that reads, decodes and segments the same images and makes the
same rows. Memory is the largest resident set size of the driver, and the largest sum of resident set sizes over all processes of
the job, in which shared pages count once per process.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from cli import console
from vilseg.config import ModelConfig, SegmentationConfig
from vilseg.model import ViLSeg
from vilseg.model.image_encoder import ImageFeatures
from vilseg.segmentation.segmenter import Segmenter

_SIZES = (2_000, 20_000, 1_000_000)
_CLASSES = ("sky", "grass")
_FOLDER_PICTURES = 1000
_SIDE = 8


class Constant(nn.Module):
    """Image encoder with the same output for every image."""

    num_features = 4
    patch_size = _SIDE

    def forward(self, images_B3HW: Tensor) -> ImageFeatures:
        """Return one patch of ones per image. Shape: (B, 3, H, W) -> patches (B, 1, 4)."""
        return ImageFeatures(images_B3HW.new_ones(len(images_B3HW), 1, self.num_features), None, (1, 1))


def main(out: Path) -> dict[str, Any]:
    """Run the benchmark. The environment variable ``VILSEG_BULK_KEYS`` replaces the largest number of images.

    Args:
        out: folder for the images, which a later run uses again.

    Returns:
        ``ratio`` (0.3 ms over the overhead per image at the largest number of images), and ``sizes``: for each number of images
        the overhead per image in milliseconds, the times in seconds and the memory in MB.
    """
    out = out.absolute()
    most = int(os.environ.get("VILSEG_BULK_KEYS", _SIZES[-1]))
    os.environ["OMP_NUM_THREADS"] = "1"
    model = str(out / "model")
    _save_model(model)
    figures = []
    for size in sorted({min(size, most) for size in _SIZES} | {most}):
        archive = out / f"archive-{size}"
        _write_archive(archive, size)
        bare = _bare(archive, model)
        ours = _vilseg(archive, model, out / "results")
        cores = os.cpu_count() or 1
        figures.append(
            {
                "keys": size,
                "overhead_ms": round((ours["seconds"] - bare) / size * cores * 1000, 4),
                "seconds": round(ours["seconds"], 1),
                "seconds_bare": round(bare, 1),
                "seconds_start": round(ours["start"], 1),
                "driver_mb": round(ours["driver_mb"]),
                "all_mb": round(ours["all_mb"]),
            }
        )
        console.log(str(figures[-1]))
    return {
        "benchmark": "bulk_scale",
        "ratio": round(0.3 / figures[-1]["overhead_ms"], 3),
        "sizes": figures,
        "cpus": os.cpu_count(),
    }


def _save_model(uri: str) -> None:
    config = ModelConfig.model_validate(
        {
            "embedding_dim": 4,
            "clusters": 2,
            "image_encoder": {"factory": "benchmarks.bulk_scale:Constant"},
            "text_encoder": {"sizes": {"hidden_size": 16, "num_hidden_layers": 0, "num_attention_heads": 1}},
        }
    )
    settings = SegmentationConfig(input_size=_SIDE)
    ViLSeg.from_config(config, ["the sky over the grass"], segmentation=settings).save_pretrained(uri)


def _write_archive(folder: Path, size: int) -> None:
    if (folder / "whole").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    with ProcessPoolExecutor() as pool:
        for _ in pool.map(_write_folder, [(folder, start, size) for start in range(0, size, _FOLDER_PICTURES)]):
            pass
    (folder / "whole").mkdir()


def _write_folder(wanted: tuple[Path, int, int]) -> None:
    folder, start, size = wanted
    buffer = io.BytesIO()
    Image.fromarray(np.full((_SIDE, _SIDE, 3), start % 256, np.uint8)).save(buffer, "png")
    below = folder / f"{start // _FOLDER_PICTURES:04d}"
    below.mkdir(parents=True)
    for number in range(start, min(start + _FOLDER_PICTURES, size)):
        (below / f"{number:07d}.png").write_bytes(buffer.getvalue())


def _bare(archive: Path, model: str) -> float:
    """Seconds of a loop in one process a core, their start not counted."""
    workers = os.cpu_count() or 1
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(workers + 1)
    processes = [
        context.Process(target=_bare_worker, args=(archive, model, rank, workers, barrier)) for rank in range(workers)
    ]
    for process in processes:
        process.start()
    barrier.wait()
    started = time.perf_counter()
    for process in processes:
        process.join()
    return time.perf_counter() - started


def _bare_worker(archive: Path, model: str, rank: int, workers: int, barrier: Any) -> None:
    from vilseg.data.image_decoding import decode_image

    torch.set_num_threads(1)
    segmenter = Segmenter(ViLSeg.from_pretrained(model), _CLASSES, keep_clusters=False)
    files = sorted(archive.glob("*/*.png"))[rank::workers]
    barrier.wait()
    for file in files:
        result = segmenter(decode_image(file.read_bytes()))
        _ = [(region.class_name, region.area, region.score, region.rle) for region in result.regions]


def _vilseg(archive: Path, model: str, out: Path) -> dict[str, float]:
    code = f"from benchmarks.bulk_scale import run; run({str(archive)!r}, {model!r}, {str(out)!r})"
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def run(archive: str, model: str, out: str) -> None:
    """Run one whole job with this process as driver, and print its times (seconds) and memory (MB) as a JSON object."""
    from cluster.ray_session import ray_session
    from jobs.segment import segment_job
    from jobs.segment.plan import plan
    from vilseg.text.vocabulary import Vocabulary

    first: list[float] = []
    memory = [0.0]

    def note(progress: segment_job.Progress) -> None:
        if not first:
            first.append(time.perf_counter())

    def watch() -> None:
        while not over.wait(0.5):
            memory[0] = max(memory[0], _resident_mb(os.getpid()))

    over = threading.Event()
    threading.Thread(target=watch, daemon=True).start()
    with ray_session() as session:
        started = time.perf_counter()
        job = plan([archive], model, Vocabulary.of(_CLASSES), out, formats=["parquet"], overwrite=True)
        segment_job.main(job, session, progress=note)
        ended = time.perf_counter()
        over.set()
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    found = {"seconds": ended - first[0], "start": first[0] - started}
    print(json.dumps({**found, "driver_mb": int(peak.split()[1]) / 1024, "all_mb": memory[0]}))


def _resident_mb(root: int) -> float:
    """Resident memory of a process and its descendants in MB (proc(5))."""
    parents: dict[int, int] = {}
    pages: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended
        parents[int(folder.name)], pages[int(folder.name)] = int(fields[1]), int(fields[21])
    family = {root}
    while more := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= more
    return sum(pages.get(pid, 0) for pid in family) * os.sysconf("SC_PAGE_SIZE") / 2**20
