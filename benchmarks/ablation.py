"""Ablation: mIoU on unseen synthetic scenes, with one part of the method changed at a time, and of two peer models.

Every row of the results is a variant of the demo's configuration (see `VARIANTS`) or a peer. All are trained on the same scenes
for the same number of samples, once per seed. The peers are architectures of ``transformers`` trained from scratch on the same
pairs (see `benchmarks.peers`). A training takes minutes and there are many. The result of each is stored in ``ablation.json`` in
this file's folder, so that an interrupted benchmark continues with the trainings that have no result, also on another machine.
"""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch

from benchmarks import peers, scene_runs
from benchmarks.tables import replace_section
from cli import console
from vilseg import storage
from vilseg.config import RunConfig
from vilseg.evaluation.datasets import FolderDataset
from vilseg.evaluation.evaluate import evaluate
from vilseg.model import ViLSeg
from vilseg.segmentation.segmenter import Segmenter

FIGURES = Path(__file__).parent / "ablation.json"
"""Of every training, by :attr:`Job.key`; take this file away to measure everything anew."""
_STEPS = 400
"""Of 32 pairs, as in the demo, which makes nearly four times as many."""
_SEEDS = (0, 1, 2)
_LONG_STEPS = 7_500
"""Five times the demo's."""
_LONG_EVALUATIONS = 10
_REQUIRED = ("data.source=pairs", "trainer.storage=runs")
"""Places, which make no difference to what is learnt."""

CAPTIONS_ALONE = ("loss.nouns.weight=0", "loss.mutual_information.weight=0", "loss.cross_modal.weight=1")


@dataclass(frozen=True)
class Variant:
    """Row of the ablation: its name, its configuration overrides, and the part of the method that they belong to."""

    name: str
    overrides: tuple[str, ...] = ()
    part: str = ""
    """Of the method; rows of one part stand together."""


_PARTS = ("", "contrast", "nouns", "vision", "clustering", "reading", "peer")
VARIANTS = (
    Variant("default"),
    Variant("captions alone, global", (*CAPTIONS_ALONE, "segmentation.region_weight=0"), "contrast"),
    Variant(
        "captions alone, half on the mean of the patches",
        (
            *CAPTIONS_ALONE,
            "loss.cross_modal.patch_share=0.5",
            "loss.cross_modal.patch_pooling=mean",
            "segmentation.region_weight=0",
        ),
        "contrast",
    ),
    Variant(
        "captions alone, half on patches by soft-max",
        (*CAPTIONS_ALONE, "loss.cross_modal.patch_share=0.5", "segmentation.region_weight=0"),
        "contrast",
    ),
    Variant("captions as much as nouns", ("loss.cross_modal.weight=1",), "contrast"),
    Variant("half of it on patches by soft-max", ("loss.cross_modal.patch_share=0.5",), "contrast"),
    Variant("temperature from 0.07 on, as CLIP", ("loss.cross_modal.temperature=0.07",), "contrast"),
    Variant("temperature from 0.15 on", ("loss.cross_modal.temperature=0.15",), "contrast"),
    Variant(
        "sigmoid in the place of InfoNCE",
        ("loss.cross_modal.form=sigmoid", "loss.cross_modal.temperature=0.1"),
        "contrast",
    ),
    Variant("nouns alone", ("loss.cross_modal.weight=0",), "nouns"),
    Variant("without nouns", ("loss.nouns.weight=0", "loss.cross_modal.weight=1"), "nouns"),
    Variant("nouns by corpus statistics", ("loss.nouns.finder=statistics",), "nouns"),
    Variant("with DINO", ("loss.vision.weight=0.1",), "vision"),
    Variant("with InfoNCE of local and global crops", ("loss.vision.weight=0.1", "loss.vision.form=infonce"), "vision"),
    Variant("in place, without displacements", ("loss.mutual_information.radius=0",), "clustering"),
    Variant("entropies weighted 1", ("loss.mutual_information.entropy_weight=1",), "clustering"),
    Variant("the encoder learns from the clusters too", ("loss.mutual_information.train_encoder=true",), "clustering"),
    Variant("with 100 more clusters beside", ("loss.mutual_information.overclusters=100",), "clustering"),
    Variant("10 clusters", ("model.clusters=10",), "clustering"),
    Variant("35 clusters", ("model.clusters=35",), "clustering"),
)
_READ = ("segmentation.region_weight=0.6", "segmentation.image_mix=0.1")
"""All rows are read alike, and not as the demo happens to: another reading there would make every training old."""
READINGS: dict[str, dict[str, float]] = {
    "by patches alone": {"region_weight": 0.0, "image_mix": 0.0},
    "0.3 by regions, as the demo": {"region_weight": 0.3, "image_mix": 0.0},
    "0.6 by regions": {"region_weight": 0.6, "image_mix": 0.0},
    "by regions alone": {"region_weight": 1.0, "image_mix": 0.0},
}
"""The default's own models, read otherwise: with the head apart, its loss does not reach the encoder."""


@dataclass(frozen=True)
class Job:
    """One training of a variant or a peer, with one seed."""

    name: str
    seed: int
    overrides: tuple[str, ...]
    steps: int
    evaluations: int = 1
    rate: float | None = None
    """Learning rate of a peer."""
    readings: bool = False
    """Whether the model is read in every way of `READINGS`."""

    @property
    def key(self) -> str:
        """Key of the result in ``ablation.json``; equal for trainings of vilseg with equal settings, whatever their names.

        It contains a hash of the settings that differ from vilseg's defaults, so that a new configuration key makes no result
        invalid. The key of a peer also contains the peer's name.
        """
        config = RunConfig.load(str(scene_runs.CONFIG), [*_REQUIRED, *self.overrides]).model_dump(
            mode="json", exclude_defaults=True
        )
        settings = json.dumps([config, self.steps, self.seed, self.evaluations, self.rate], sort_keys=True)
        kind = self.name if self.rate is not None else "vilseg"
        return f"{kind}-{self.steps}-{self.seed}-{hashlib.sha256(settings.encode()).hexdigest()[:12]}"


def main(out: Path) -> dict[str, Any]:
    """Train every variant and peer with every seed, in one process per CPU core.

    Args:
        out: folder for the scenes, which a later run uses again.

    Returns:
        ``ratio`` (mIoU of the default over mIoU of the better peer), ``ahead_of_peers`` (their difference), ``rows`` (for each
        variant and peer the mean mIoU and its standard deviation over seeds, ``ahead``, the mean over seeds of its mIoU minus
        the default's with the same seed, and ``ahead_error``, the standard error of ``ahead``), ``curves`` (mIoU over samples
        of two runs five times as long as the demo's, the default and captions alone), and ``readings`` (mIoU of the default at
        the end of its long run with each inference setting of `READINGS`).
    """
    out = out.absolute()
    scene_runs.draw(out)
    first, *seeds = _SEEDS
    tuning = [Job(name, first, _READ, _STEPS, rate=rate) for name in peers.PEERS for rate in peers.RATES]
    long = [
        Job("default, long", first, (), _LONG_STEPS, _LONG_EVALUATIONS, readings=True),
        Job("captions alone, long", first, (*_READ, *VARIANTS[1].overrides), _LONG_STEPS, _LONG_EVALUATIONS),
    ]
    found = _run(out, tuning)
    jobs = [
        max((job for job in tuning if job.name == name), key=lambda job: found[job]["miou"]) for name in peers.PEERS
    ]
    jobs += [replace(job, seed=seed) for job in jobs for seed in seeds]
    jobs += [job for seed in _SEEDS for job in _variants(seed)]
    found |= _run(out, [*long, *jobs])  # the long ones first, so that no core is idle at the end
    default = [found[job] for job in jobs if job.name == VARIANTS[0].name]
    rows = [_row(name, part, [found[job] for job in jobs if job.name == name], default) for name, part in _names()]
    rows += [_row(name, "reading", [one | {"miou": one[name]} for one in default], default) for name in READINGS]
    rows.sort(key=lambda row: _PARTS.index(row["part"]))
    curves = {job.name: found[job]["curve"] for job in long}
    best_peer = max(row["miou"] for row in rows if row["part"] == "peer")
    figure = Path(__file__).parent / "ablation.png"
    _draw_figure(rows, curves, figure)
    samples = _STEPS * scene_runs.config(out).trainer.batch_size
    readings = {name: found[long[0]][name] for name in READINGS}
    replace_section(Path(__file__).parent / "RESULTS.md", "ablation", _table(rows, curves, readings, samples))
    return {
        "benchmark": "ablation",
        "ratio": round(rows[0]["miou"] / best_peer, 3),
        "miou": rows[0]["miou"],
        "ahead_of_peers": round(rows[0]["miou"] - best_peer, 4),
        "rows": rows,
        "curves": curves,
        "readings": readings,
        "samples": samples,
        "seeds": len(_SEEDS),
    }


def _variants(seed: int) -> list[Job]:
    return [
        Job(variant.name, seed, (*_READ, *variant.overrides), _STEPS, readings=variant.name == VARIANTS[0].name)
        for variant in VARIANTS
    ]


def _names() -> list[tuple[str, str]]:
    return [(variant.name, variant.part) for variant in VARIANTS] + [(name, "peer") for name in peers.PEERS]


def _run(out: Path, jobs: list[Job]) -> dict[Job, dict[str, Any]]:
    """Figures of every job, from where an earlier run left them or anew."""
    known: dict[str, Any] = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
    found = {job: known[job.key] for job in jobs if _asked(job) <= known.get(job.key, {}).keys()}
    left = [job for job in jobs if job not in found]
    started = time.monotonic()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=context, initializer=partial(torch.set_num_threads, 1)) as pool:
        running = {pool.submit(_train, out, job): job for job in left}
        for number, future in enumerate(as_completed(running), 1):
            job = running[future]
            known[job.key] = found[job] = future.result()
            storage.write_text(str(FIGURES), json.dumps(known, indent=1, sort_keys=True) + "\n")
            minutes = (time.monotonic() - started) / 60
            console.log(
                f"{number}/{len(left)} {job.name}, seed {job.seed}: mIoU {found[job]['miou']:.4f} ({minutes:.0f} min)"
            )
    return found


def _asked(job: Job) -> set[str]:
    """Names of the metrics that a job must have."""
    return {"miou", *(READINGS if job.readings else ())}


def _train(out: Path, job: Job) -> dict[str, Any]:
    """One training with its evaluations, in this process."""
    dataset = _unseen(f"{out}/unseen")
    started = time.perf_counter()
    if job.rate is not None:
        config = scene_runs.config(out, f"trainer.steps={job.steps}", f"trainer.seed={job.seed}", *job.overrides)
        miou = peers.train(job.name, config, dataset, job.rate)
        return {
            "miou": miou,
            "curve": [[job.steps * config.trainer.batch_size, miou]],
            "seconds": time.perf_counter() - started,
        }
    name = job.key
    config = scene_runs.config(
        out, f"trainer.steps={job.steps}", f"trainer.seed={job.seed}", f"name={name}", *job.overrides
    )
    config = config.replace(**{"trainer.checkpoint_every": job.steps // job.evaluations})
    curve: list[list[float]] = []

    def miou(model: ViLSeg) -> float:
        return round(evaluate(Segmenter(model, dataset.classes, device="cpu"), dataset).miou, 4)

    def measure(model: ViLSeg, step: int) -> None:
        curve.append([step * config.trainer.batch_size, miou(model)])

    model = scene_runs.train(config, measure)
    found = {"miou": curve[-1][1], "curve": curve, "seconds": round(time.perf_counter() - started, 1)}
    if job.readings:
        for name, reading in READINGS.items():
            model.segmentation = model.segmentation.replace(**reading)
            found[name] = miou(model)
    return found


@cache
def _unseen(uri: str) -> FolderDataset:
    return FolderDataset(uri)


def _row(name: str, part: str, found: list[dict[str, Any]], default: list[dict[str, Any]]) -> dict[str, Any]:
    """Both lists are in the order of the seeds: two trainings with one seed differ by less than two seeds do."""
    mious = [one["miou"] for one in found]
    ahead = [miou - usual["miou"] for miou, usual in zip(mious, default, strict=True)]
    return {
        "name": name,
        "part": part,
        "miou": round(fmean(mious), 4),
        "spread": round(stdev(mious), 4),
        "ahead": round(fmean(ahead), 4),
        "ahead_error": round(stdev(ahead) / math.sqrt(len(ahead)), 4),
        "seconds": round(fmean(one["seconds"] for one in found), 1),
    }


def _table(
    rows: list[dict[str, Any]], curves: dict[str, list[list[float]]], readings: dict[str, float], samples: int
) -> str:
    lines = [
        f"{samples:,} samples, {len(_SEEDS)} seeds, {scene_runs.UNSEEN} unseen scenes; ± is the standard deviation over the "
        "seeds. The difference to the default is taken seed by seed; its ± is the standard error. All are read with "
        f"`{' '.join(_READ)}`, but for captions alone, by patches, and the part reading, the default's models read otherwise. "
        f"The peers learn at the best of the rates {', '.join(f'{rate:g}' for rate in peers.RATES)} (seed {_SEEDS[0]}).",
        "",
        "| part | variant | mIoU | to the default |",
        "|---|---|---|---|",
    ]
    for row in rows:
        difference = f"{row['ahead']:+.3f} ± {row['ahead_error']:.3f}" if row["name"] != "default" else ""
        lines.append(f"| {row['part']} | {row['name']} | {row['miou']:.3f} ± {row['spread']:.3f} | {difference} |")
    lines += [
        "",
        "mIoU over samples, five times the demo's; the default is read as the demo is, captions alone as above:",
        "",
    ]
    for name, curve in curves.items():
        lines.append(f"- {name}: " + ", ".join(f"{miou:.3f} ({seen:,.0f})" for seen, miou in curve))
    ways = ", ".join(f"{name} {miou:.3f}" for name, miou in readings.items())
    lines += ["", f"The default at the end of the long run, read otherwise: {ways}."]
    lines += ["", "![mIoU of the variants, and over samples](ablation.png)"]
    return "\n".join(lines)


def _draw_figure(rows: list[dict[str, Any]], curves: dict[str, list[list[float]]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6), layout="constrained")
    bars, lines = figure.subplots(1, 2, width_ratios=(3, 2))
    names = [row["name"] for row in rows][::-1]
    colours = [
        "tab:red" if row["part"] == "peer" else "tab:green" if row["name"] == "default" else "tab:blue" for row in rows
    ]
    bars.barh(
        names, [row["miou"] for row in rows][::-1], xerr=[row["spread"] for row in rows][::-1], color=colours[::-1]
    )
    bars.axvline(rows[0]["miou"], color="tab:green", linewidth=0.8)
    bars.set_xlabel("mIoU on unseen scenes, mean and deviation over seeds")
    for name, curve in curves.items():
        lines.plot(*zip(*curve, strict=True), marker="o", label=name)
    lines.set_xlabel("samples")
    lines.set_ylabel("mIoU")
    lines.set_ylim(0)
    lines.legend()
    figure.savefig(path, dpi=100)
