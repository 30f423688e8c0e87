"""Export of a trained model as ONNX, for programs without torch; needs onnx, onnxruntime and onnxscript (extra ``export``).

    image.onnx       images (B, 3, H, W) float32, RGB in 0..1; the pixel normalisation is part of the graph
                     -> image_embedding (B, D), patch_embeddings (B, D, h, w), assignments (B, K, h, w)
    text.onnx        tokens (B, T) int64 -> text_embedding (B, D)
    tokenizer/       texts -> tokens; its ``tokenizer.json`` truncates and pads to the input of the text tower
    statistics.npz   caption_mean (D,), patch_mean (D,), patch_covariance (D, D), to centre text embeddings and calibrate scores
    export.json      sizes, names, temperatures, and the formulas that classify regions; written last

All embeddings have unit length. The outputs of both files in onnxruntime are compared with torch before the output directory
is created.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from vilseg import storage
from vilseg.errors import UserError
from vilseg.export.description import describe
from vilseg.export.onnx_file import export_error, fixed_positions, largest_difference, reraise_disk_error, write_onnx
from vilseg.export.output_directory import (
    DESCRIPTION,
    IMAGE_TOWER,
    STATISTICS,
    TEXT_TOWER,
    TOKENIZER,
    check_target,
    output_folder,
)
from vilseg.export.towers import ImageTower, TextTower
from vilseg.model import ViLSeg
from vilseg.segmentation.dense_features import patch_size

_PACKAGES = ("onnx", "onnxruntime", "onnxscript")
_ANOTHER_SIZE = 8
"""Number of patches by which a side is shortened for the second image size that is checked; at least one patch remains."""
_IMAGE_INPUT = ("batch", 3, "height", "width")
_WORDS = ("dog", "two cats on a sofa", "")


@dataclass(frozen=True)
class ExportResult:
    """Location of a finished export, and its difference from the torch model."""

    uri: str
    """Absolute path or URI of the output directory."""
    difference: float
    """Largest absolute difference from torch over all outputs."""
    fixed_size: tuple[int, int] | None
    """(H, W) in pixels if the image tower accepts only this size; None if it accepts any size."""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dictionary for JSON."""
        return asdict(self)


def require_packages() -> None:
    """Raise UserError if a package of the extra ``export`` is missing."""
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        are = "is" if len(missing) == 1 else "are"
        raise UserError(f"ONNX needs {' and '.join(missing)}, which {are} not installed: pip install 'vilseg[export]'")


def export_model(
    model: ViLSeg,
    out: str,
    *,
    name: str = "",
    overwrite: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> ExportResult:
    """Write ``model`` as a folder and compare the outputs of its ONNX files with torch; the module's docstring lists the files.

    Args:
        model: model to export; it is moved to the CPU, to float32 and to evaluation mode.
        out: path or URI of the folder. On a local disk it is replaced atomically; on an object store ``export.json`` is
            uploaded last.
        name: name of the model in ``export.json``.
        overwrite: replace an export that exists at ``out``.
        say: called with a line of progress text at each stage.

    Raises:
        ModelError: the model has operations that ONNX cannot express, or an output differs from torch by more than 1e-4.
        StorageError: ``out`` exists and may not be replaced (see `check_target`), or cannot be written.
        UserError: a package of the extra ``export`` is missing.
    """
    require_packages()
    check_target(out, overwrite=overwrite)
    model = model.cpu().float().eval()
    with output_folder(out) as folder, torch.no_grad():
        say("writing and checking the image tower")
        fixed_size, image_difference = _write_image_tower(model, folder / IMAGE_TOWER)
        if fixed_size:
            say("this encoder cannot be exported for images of any size; it takes {} x {} pixels".format(*fixed_size))
        say("writing and checking the text tower")
        text_difference = _write_text_tower(model, folder / TEXT_TOWER)
        _write_tokenizer(model, folder / TOKENIZER)
        statistics = {key: getattr(model, key).numpy() for key in ("caption_mean", "patch_mean", "patch_covariance")}
        np.savez(folder / STATISTICS, **statistics)
        done = ExportResult(storage.absolute(out), max(image_difference, text_difference), fixed_size)
        text = json.dumps(
            describe(model, name, difference=done.difference, fixed_size=fixed_size), indent=2, ensure_ascii=False
        )
        (folder / DESCRIPTION).write_text(text + "\n", encoding="utf-8")
    return done


def _write_image_tower(model: ViLSeg, path: Path) -> tuple[tuple[int, int] | None, float]:
    """Write the image tower and compare it with torch.

    Returns:
        (H, W) in pixels if the tower accepts only this size, None if it accepts any size; and the largest absolute difference.
    """
    patch = patch_size(model)
    side = max(1, round(model.segmentation.input_size / patch)) * patch
    tower = ImageTower(model).eval()
    clusters = model.config.clusters
    outputs = {
        "image_embedding": ("batch", model.embedding_dim),
        "patch_embeddings": ("batch", model.embedding_dim, "rows", "columns"),
        "assignments": ("batch", clusters, "rows", "columns"),
    }
    generator = torch.Generator().manual_seed(0)
    failure: Exception | None = None
    for fixed_size in (None, (side, side)):
        # Trace at a size other than the default, because encoders treat their default size as a special case.
        example = (side + patch, side + 3 * patch) if fixed_size is None else fixed_size
        another = (max(side - _ANOTHER_SIZE * patch, patch), side + patch)
        sizes = [(side, side), another] if fixed_size is None else [fixed_size]
        batches = [torch.rand(count, 3, *size, generator=generator) for size in sizes for count in (1, 3)]
        axes = [0, 2, 3] if fixed_size is None else [0]
        try:
            with fixed_positions(model.image_encoder):
                write_onnx(
                    tower,
                    torch.rand(2, 3, *example, generator=generator),
                    axes,
                    {"images": _IMAGE_INPUT},
                    outputs,
                    path,
                )
            return fixed_size, largest_difference(tower, batches, path)
        except Exception as error:  # noqa: BLE001  (exporter and runtime raise many types, all for the same reason)
            failure = reraise_disk_error(error)
    assert failure is not None
    raise export_error("image", failure) from failure


def _write_text_tower(model: ViLSeg, path: Path) -> float:
    """Write the text tower and compare it with torch; return the largest absolute difference."""
    encoder, tower = model.text_encoder, TextTower(model).eval()
    fixed = encoder.fixed_length or encoder.max_tokens < 3
    texts = [prompt.format(word) for prompt in model.segmentation.prompts for word in _WORDS]
    rows_BT = encoder.tokenize(texts)
    batches = [rows_BT[:1], rows_BT[:3]]
    if not fixed:
        batches += [encoder.trim(rows) for rows in batches]
    example = encoder.tokenize(texts[:2])[:, : encoder.max_tokens - (not fixed)].contiguous()
    length = encoder.max_tokens if fixed else "length"
    try:
        axes = [0] if fixed else [0, 1]
        outputs = {"text_embedding": ("batch", model.embedding_dim)}
        write_onnx(tower, example, axes, {"tokens": ("batch", length)}, outputs, path)
        return largest_difference(tower, batches, path)
    except Exception as error:
        raise export_error("text", reraise_disk_error(error)) from error


def _write_tokenizer(model: ViLSeg, folder: Path) -> None:
    """Write the tokenizer's files; ``tokenizer.json`` pads and truncates rows to lengths that the text tower accepts."""
    encoder = model.text_encoder
    encoder.tokenizer.save_pretrained(str(folder))
    fixed = encoder.fixed_tokenizer()
    tokenizer = Tokenizer.from_str(fixed.serialized)
    tokenizer.enable_truncation(fixed.max_tokens)
    pad: Any = encoder.tokenizer.pad_token
    length = fixed.max_tokens if encoder.fixed_length else None
    tokenizer.enable_padding(pad_id=fixed.pad_id, pad_token=pad, length=length)
    tokenizer.save(str(folder / "tokenizer.json"))
