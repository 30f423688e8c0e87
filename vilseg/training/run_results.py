"""Results of a run: its model at a checkpoint, the trained model with its card, and the record of a loss that is not finite."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from vilseg import storage
from vilseg.config import RunConfig
from vilseg.model import ViLSeg
from vilseg.training.checkpoints import read_checkpoint
from vilseg.training.loop import NonFiniteLossError
from vilseg.training.run_dir import RunDirectory


def load_model_at_step(run_dir: RunDirectory, step: int) -> ViLSeg:
    """Load the model, in evaluation mode, from the checkpoint at ``step``."""
    model = ViLSeg.from_pretrained(run_dir.initial)
    objective = read_checkpoint(run_dir, step)["objective"]
    prefix = "model."
    weights = {name.removeprefix(prefix): value for name, value in objective.items() if name.startswith(prefix)}
    model.load_state_dict(weights)
    return model.eval()


@contextmanager
def record_nonfinite(run_dir: RunDirectory) -> Iterator[None]:
    """Write the details of a NonFiniteLossError that the ``with`` block raises to the run directory, then raise it again.

    The details are the step, its losses and the keys of its pairs. The error raised again also names the file.
    """
    try:
        yield
    except NonFiniteLossError as error:
        text = json.dumps(error.details, ensure_ascii=False)
        storage.write_text(run_dir.nonfinite, text)
        raise NonFiniteLossError(
            f"{error}; all of its pairs are named in {run_dir.nonfinite}", error.details
        ) from error


def save_trained_model(
    model: ViLSeg,
    config: RunConfig,
    run_dir: RunDirectory,
    metrics: dict[str, float],
    weights: dict[str, Tensor] | None = None,
) -> None:
    """Write the trained model and its model card to the run directory.

    Args:
        model: trained model.
        config: configuration of the run.
        run_dir: directory of the run.
        metrics: last report, shown in the model card.
        weights: full weights if those of ``model`` are sharded; see :meth:`ViLSeg.save_pretrained`.
    """
    samples = config.trainer.steps * config.trainer.batch_size
    trained = f"{config.trainer.steps:,} steps of {config.trainer.batch_size} pairs, {samples:,} samples"
    if "epoch" in metrics:
        trained += f", {metrics['epoch']:.1f} times through all pairs"
    model.save_pretrained(run_dir.model, card=model_card(config, trained, metrics), weights=weights)


def model_card(config: RunConfig, trained: str, metrics: dict[str, float]) -> str:
    """Return the text of a model card, Markdown.

    Args:
        config: configuration of the run.
        trained: description of the training so far.
        metrics: metrics by name, shown in a table; without metrics there is no table.
    """
    rows = "".join(f"| {name} | {value:.4g} |\n" for name, value in metrics.items())
    table = f"\n## Metrics at the end of training\n\n| | |\n|---|---|\n{rows}" if rows else ""
    parts = config.data.mix or config.data.sources.values()
    pairs = ", ".join(f"`{part.source}`" + (f" (weight {part.weight:g})" if config.data.mix else "") for part in parts)
    return (
        f"# vilseg model: {config.name}\n\n"
        "Open-vocabulary segmentation (ViL-Seg, arXiv 2207.08455) trained from image-caption pairs; no mask was used.\n\n"
        f"- pairs: {pairs}\n- trained: {trained}\n{table}\n"
        f"## Configuration\n\n```yaml\n{config.to_yaml()}```\n\n"
        "## Use\n\n```python\nimport vilseg\n\n"
        'model = vilseg.ViLSeg.from_pretrained("this folder")\n'
        'segmenter = vilseg.Segmenter(model, classes=["cat", "sofa"])\n```\n'
    )
