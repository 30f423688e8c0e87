"""Effect of self-training: further training with confident labels of the model itself, compared with the same without labels.

The demo's configuration is trained on synthetic scenes first. Each further stage starts from this model, has its own overrides
(`STAGES`) and trains on the same pairs with a third of the learning rate.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks import scene_runs
from benchmarks.tables import replace_section
from cli import console
from vilseg.config import RunConfig
from vilseg.evaluation.datasets import FolderDataset
from vilseg.evaluation.evaluate import evaluate
from vilseg.model import ViLSeg
from vilseg.segmentation.segmenter import Segmenter

_STEPS = 500
STAGES: dict[str, tuple[str, ...]] = {
    "the same losses, no labels": ("stage=contrast",),
    **{
        f"labels from {confidence} deviations on, weight 1": (
            "stage=self-train",
            "loss.self_training.weight=1",
            f"loss.self_training.confidence={confidence}",
        )
        for confidence in (1, 2, 3)
    },
    "labels from 2 deviations on, weight 0.3": ("stage=self-train", "loss.self_training.weight=0.3"),
}


def main(out: Path) -> dict[str, Any]:
    """Train the first model and every stage, and measure them.

    Args:
        out: folder for the scenes and the first model, which a later run uses again.

    Returns:
        ``miou`` of the first model (``before``) and by stage: with region and patch scores together (``blend``) and with patch
        scores alone (``patches``); ``ratio``, the best ``blend`` of a stage with labels over that of the stage without.
    """
    out = out.absolute()
    scene_runs.draw(out)
    base = str(out / "base")
    if not Path(base, "config.json").exists():
        with console.timed_stage("train", {}):
            scene_runs.train(scene_runs.config(out, "name=base")).save_pretrained(base)
    found = {"before": _measure(ViLSeg.from_pretrained(base), out)}
    for name, overrides in STAGES.items():
        with console.timed_stage(name, {}):
            found[name] = _measure(scene_runs.train(_stage(out, base, overrides)), out)
            console.log(f"{name}: mIoU {found[name]['blend']:.4f}, patches {found[name]['patches']:.4f}")
    plain, *labelled = (found[name]["blend"] for name in STAGES)
    rows = "\n".join(f"| {name} | {row['blend']:.4f} | {row['patches']:.4f} |" for name, row in found.items())
    table = f"| stage | mIoU | patches alone |\n|---|---|---|\n{rows}"
    replace_section(Path(__file__).parent / "RESULTS.md", "self_training", table)
    return {"benchmark": "self_training", "miou": found, "ratio": round(max(labelled) / plain, 3)}


def _stage(out: Path, base: str, overrides: tuple[str, ...]) -> RunConfig:
    rate = RunConfig.load(str(scene_runs.CONFIG)).optimizer.learning_rate / 3
    settings = (f"init={base}", "name=stage", f"trainer.steps={_STEPS}", f"optimizer.learning_rate={rate}")
    return scene_runs.config(out, *settings, *overrides)


def _measure(model: ViLSeg, out: Path) -> dict[str, float]:
    dataset = FolderDataset(str(out / "unseen"))
    settings = model.segmentation
    found = {}
    for name, weight in (("blend", settings.region_weight), ("patches", 0.0)):
        model.segmentation = settings.replace(region_weight=weight)
        segmenter = Segmenter(model, dataset.classes, device="cpu", keep_clusters=False)
        found[name] = round(evaluate(segmenter, dataset).miou, 4)
    model.segmentation = settings
    return found
