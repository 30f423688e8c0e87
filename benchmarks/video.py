"""Video segmentation compared with segmentation frame by frame: mIoU, temporal consistency and CPU time per frame.

The videos are moving synthetic scenes with exact masks and motion. A small model is trained first, in this process, on still
scenes and their captions, which are drawn independently of the videos.

Temporal consistency follows Liu et al. 2020 ("Efficient semantic video segmentation with per-frame inference", section 3.3): the
mIoU between the labels of a frame and those of the previous frame warped by the motion, computed over each video and averaged
over videos. Here the motion is exact, not an estimated flow, and pixels that were not visible in the previous frame are left out.
``flicker`` is the fraction of the remaining pixels whose label changes, although their true class does not.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from jobs.train.ray_data import read_batches_locally
from vilseg.config import ModelConfig, RunConfig, SegmentationConfig
from vilseg.data.shards import write_tar
from vilseg.data.synthetic import scenes
from vilseg.data.synthetic.videos import SyntheticVideo, render_video
from vilseg.evaluation.confusion_matrix import ConfusionMatrix
from vilseg.model import ViLSeg
from vilseg.segmentation.result import Segmentation
from vilseg.segmentation.segmenter import Segmenter
from vilseg.segmentation.video import segment_video
from vilseg.training import run_results, run_setup

CONFIG = Path(__file__).parent.parent / "configs" / "demo.yaml"
_PAIRS = 4_000
_STEPS = 600
_FILMS = 20
_FRAMES = 37
_ROUNDS = 3
"""How often every video is segmented in each way; the ways alternate, so that a busy machine hits them alike."""
_CLASSES = tuple(scene_class.name for scene_class in scenes.CLASSES)

Way = Callable[[Iterable[np.ndarray]], Iterable[Segmentation]]


def main(out: Path) -> dict[str, Any]:
    """Run the benchmark on one CPU thread.

    Args:
        out: folder for the pairs and the model; replaced if it exists.

    Returns:
        ``ratio`` (CPU time per frame of frame-by-frame over video segmentation, median of the rounds), ``ratio_vit_b16`` (the
        same for the paper's encoder at 224 px, with random weights, which take the same time), and for both methods the mIoU,
        ``temporal_consistency``, ``flicker`` and CPU milliseconds per frame.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        shutil.rmtree(out, ignore_errors=True)
        started = time.perf_counter()
        model = _train(out.absolute())
        trained = time.perf_counter() - started
        # Videos have no clusters, so that frame by frame should not compute them either.
        measured = _measure(Segmenter(model, _CLASSES, device="cpu", keep_clusters=False))
        return measured | {"ratio_vit_b16": _vit_b16(), "train_seconds": round(trained, 1)}
    finally:
        torch.set_num_threads(threads)


def _train(out: Path) -> ViLSeg:
    overrides = [f"data.source={out}/pairs", f"trainer.storage={out}/runs", "name=video"]
    config = RunConfig.load(str(CONFIG), [*overrides, "trainer.workers=1", f"trainer.steps={_STEPS}"])
    drawn = scenes.pairs(_PAIRS, seed=0, size=config.data.canvas)
    write_tar(f"{out}/pairs/0.tar", ((pair.key, pair.image, "jpg", {"captions": pair.captions}) for pair in drawn))
    folder = run_setup.open_run_directory(config, resume=False)
    prepared = run_setup.prepare(config, folder)
    trainer = run_setup.make_trainer(config, folder, prepared, torch.device("cpu"))
    trainer.train(read_batches_locally(config, prepared), on_report=lambda metrics: None, on_checkpoint=lambda: None)
    run_results.save_trained_model(trainer.objective.model, config, folder, {})
    return ViLSeg.from_pretrained(folder.model)


def _measure(segmenter: Segmenter) -> dict[str, Any]:
    size = segmenter.config.input_size
    films = [render_video(1, index, size, frames=_FRAMES, split="eval") for index in range(_FILMS)]
    ways: dict[str, Way] = {"frame_by_frame": partial(map, segmenter), "video": partial(segment_video, segmenter)}
    labels: dict[str, list[list[np.ndarray]]] = {}
    milliseconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(_ROUNDS):
        for name, way in ways.items():
            # CPU time of one thread: what the work costs, whatever else the machine does.
            started = time.process_time()
            labels[name] = [[result.labels for result in way(film.images)] for film in films]
            milliseconds[name].append((time.process_time() - started) * 1000 / (_FILMS * _FRAMES))
    ratios = [theirs / ours for theirs, ours in zip(*milliseconds.values(), strict=True)]
    return {
        "benchmark": "video",
        "ratio": round(median(ratios), 3),
        **{name: _quality(films, labels[name], median(milliseconds[name])) for name in ways},
        "ratios": [round(ratio, 3) for ratio in ratios],
        "films": _FILMS,
        "frames": _FILMS * _FRAMES,
        "size": size,
    }


def _vit_b16() -> float:
    config = ModelConfig.model_validate({"image_encoder": {"architecture": "vit"}})
    settings = SegmentationConfig(input_size=224, region_weight=0.5)
    torch.manual_seed(0)
    model = ViLSeg.from_config(config, ["the sky over the sea", "a boat"], segmentation=settings)
    segmenter = Segmenter(model, _CLASSES, device="cpu", keep_clusters=False)
    film = render_video(1, 0, settings.input_size, frames=_FRAMES, split="eval")
    ways: list[Way] = [partial(map, segmenter), partial(segment_video, segmenter)]
    seconds = []
    for way in ways:
        segmenter(film.images[0])
        started = time.process_time()
        assert sum(1 for _ in way(film.images)) == _FRAMES
        seconds.append(time.process_time() - started)
    return round(seconds[0] / seconds[1], 3)


def _quality(films: list[SyntheticVideo], labels: list[list[np.ndarray]], milliseconds: float) -> dict[str, float]:
    truth = ConfusionMatrix(_CLASSES)
    consistency, changed, pixels = [], 0, 0
    for film, found in zip(films, labels, strict=True):
        steady = ConfusionMatrix(_CLASSES)
        for before, now, mask, sources in zip([None, *found], found, film.masks, film.sources, strict=False):
            truth.update(now, mask)
            if before is not None:
                visible = sources >= 0
                moved = np.where(visible, before.ravel()[sources], steady.ignore)
                steady.update(now, moved)
                changed += int((now != moved)[visible].sum())
                pixels += int(visible.sum())
        consistency.append(steady.miou)
    return {
        "miou": round(truth.miou, 4),
        "pixel_accuracy": round(truth.pixel_accuracy, 4),
        "temporal_consistency": round(float(np.mean(consistency)), 4),
        "flicker": round(changed / pixels, 4),
        "cpu_milliseconds_a_frame": round(milliseconds, 2),
    }
