"""A trained model as ONNX, for programs that have no torch; it needs onnx, onnxruntime and onnxscript (the extra ``export``).

    image.onnx       images (B, 3, H, W) float32, RGB in 0..1; normalisation is inside
                     -> image_embedding (B, D), patch_embeddings (B, D, h, w), assignments (B, K, h, w)
    text.onnx        tokens (B, T) int64 -> text_embedding (B, D)
    tokenizer/       texts -> tokens; its ``tokenizer.json`` cuts and pads as the text tower wants it
    statistics.npz   caption_mean (D,), patch_mean (D,), patch_covariance (D, D), for centred and calibrated texts
    export.json      sizes, names, temperatures, and how regions are named; written last

All embeddings have unit length. Both towers are compared with torch by onnxruntime before the folder appears.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from vilseg import storage
from vilseg.errors import ModelError, UserError
from vilseg.export.output_directory import (
    DESCRIPTION,
    IMAGE_TOWER,
    STATISTICS,
    TEXT_TOWER,
    TOKENIZER,
    WEIGHTS_BESIDE,
    check_target,
    output_folder,
)
from vilseg.model import ViLSeg
from vilseg.model.image_encoder import first_line
from vilseg.segmentation.dense_features import patch_size

FORMAT = 1
OPSET = 18
"""What torch's exporter is written in, so nothing is converted; runtimes from 2023 on read it."""
TOLERANCE = 1e-4
"""Largest difference from torch; all outputs lie in -1..1."""

_PACKAGES = ("onnx", "onnxruntime", "onnxscript")
_LARGEST_FILE = 1_900_000_000
"""Bytes of weights that fit into one ONNX file (protobuf ends at 2 GiB); more go into a file beside it."""
_ANOTHER_SIZE = 8
"""Patches that a side is shortened by for the second size checked, as far as that leaves one."""
_IMAGE_INPUT = ("batch", 3, "height", "width")
_WORDS = ("dog", "two cats on a sofa", "")
_NAMING = (
    "texts: for every class name (tv_monitor is 'tv monitor'), synonym and background word the mean of its text_embedding "
    "over the prompts; minus caption_mean if center_text; scaled to unit length: t_c",
    "regions: r_k = unit(sum_n a_nk p_n) with patch_embeddings p_n and assignments a_nk; g = unit(mean_n p_n); with "
    "m = image_mix, r'_k = unit((1 - m) r_k + m g) and p'_n = unit((1 - m) p_n + m g)",
    "scores: s_nc = w sum_k a_nk <r'_k, t_c> + (1 - w) <p'_n, t_c> with w = region_weight",
    "calibration: s'_nc = (s_nc - q <patch_mean, t_c>) (mean_c'(sigma_c') / sigma_c)^q with q = calibration and "
    "sigma_c = sqrt(t_c^T patch_covariance t_c), the mean over all texts",
    "classes: the scores of a class's names become one by synonyms (max, mean, or logsumexp = temperature log mean exp(s / "
    "temperature)); background has the best of the background words (of its own name where there are none) plus "
    "background_bias, and of the negative words, which are no class where there is no background",
    "objectness: to the best of the background words is added objectness (1 - 2 sum_k a_nk exp(-c_k^2 / 2)) with c_k = "
    "sum_{n on the border} a_nk / sqrt(sum_n a_nk)",
    "gate: where set, only so many classes stay, those of the highest score anywhere in the picture",
    "pixels: scores enlarged bilinearly to the picture's size; label = arg max, its probability by soft-max of "
    "scores / temperature; below threshold it is background or no class",
)
"""As in `vilseg.segmentation.class_scores`. The refinement along edges, where the settings have one, is not part of it."""


@dataclass(frozen=True)
class ExportResult:
    """What an export wrote."""

    uri: str
    difference: float
    """Largest difference from torch, of any output."""
    fixed_size: tuple[int, int] | None
    """(H, W) where the image tower takes no other."""

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)


class ImageTower(nn.Module):
    """Images -> what naming them takes. Shape: (B, 3, H, W) RGB in 0..1 -> (B, D), (B, D, h, w), (B, K, h, w)."""

    def __init__(self, model: ViLSeg) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Global embedding, patch embeddings, soft cluster assignments."""
        features, named_BNF = self.model.dense_features(images, self.model.segmentation.attention)
        patches_BND = self.model.embed_patches(features._replace(patches=named_BNF))
        assignments_BNK = self.model.cluster_logits(features).softmax(-1)
        maps = (values.transpose(1, 2).unflatten(2, features.grid) for values in (patches_BND, assignments_BNK))
        return self.model.embed_pooled(features), *maps


class TextTower(nn.Module):
    """Token rows -> embeddings. Shape: (B, T) -> (B, D), unit length."""

    def __init__(self, model: ViLSeg) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        """Padding is known by its id."""
        return self.model.embed_text(self.model.text_encoder(tokens))


def require_packages() -> None:
    """Raise UserError where a package of the extra ``export`` is missing."""
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
    """Write ``model`` as a folder of ONNX files and compare them with it; see the module for what is in it.

    Args:
        model: moved to the CPU, in float32 and evaluation mode.
        out: folder or URI; it appears whole or not at all, on an object store ``export.json`` last.
        name: what ``export.json`` calls the model.
        overwrite: replace the export that is there.
        say: told what is being done.

    Raises:
        ModelError: the model has operations that ONNX cannot express, or the result differs from torch by more than 1e-4.
        StorageError: ``out`` exists, or cannot be written.
        UserError: a package is missing.
    """
    require_packages()
    check_target(out, overwrite=overwrite)
    model = model.cpu().float().eval()
    with output_folder(out) as folder, torch.no_grad():
        say("writing and checking the image tower")
        fixed_size, of_images = _write_image_tower(model, folder / IMAGE_TOWER)
        if fixed_size:
            say("this encoder cannot be written for pictures of any size; it takes {} x {} pixels".format(*fixed_size))
        say("writing and checking the text tower")
        of_texts = _write_text_tower(model, folder / TEXT_TOWER)
        _write_tokenizer(model, folder / TOKENIZER)
        statistics = {key: getattr(model, key).numpy() for key in ("caption_mean", "patch_mean", "patch_covariance")}
        np.savez(folder / STATISTICS, **statistics)
        done = ExportResult(storage.absolute(out), max(of_images, of_texts), fixed_size)
        text = json.dumps(_describe(model, name, done), indent=2, ensure_ascii=False)
        (folder / DESCRIPTION).write_text(text + "\n", encoding="utf-8")
    return done


def _write_image_tower(model: ViLSeg, path: Path) -> tuple[tuple[int, int] | None, float]:
    """The size that it is bound to, or None, and the largest difference from torch."""
    patch = patch_size(model)
    side = max(1, round(model.segmentation.input_size / patch)) * patch
    tower = ImageTower(model).eval()
    clusters = model.config.clusters
    outputs = {
        "image_embedding": ("batch", model.embedding_dim),
        "patch_embeddings": ("batch", model.embedding_dim, "rows", "columns"),
        "assignments": ("batch", clusters, "rows", "columns"),
    }
    made = torch.Generator().manual_seed(0)
    failure: Exception | None = None
    for fixed_size in (None, (side, side)):
        # The size that it is traced at is none that an encoder may treat as a case of its own, as it does its usual one.
        example = (side + patch, side + 3 * patch) if fixed_size is None else fixed_size
        another = (max(side - _ANOTHER_SIZE * patch, patch), side + patch)
        sizes = [(side, side), another] if fixed_size is None else [fixed_size]
        batches = [torch.rand(count, 3, *size, generator=made) for size in sizes for count in (1, 3)]
        axes = [0, 2, 3] if fixed_size is None else [0]
        try:
            with _one_size(model.image_encoder):
                _write(tower, torch.rand(2, 3, *example, generator=made), axes, {"images": _IMAGE_INPUT}, outputs, path)
            return fixed_size, _largest_difference(tower, batches, path)
        except Exception as error:  # noqa: BLE001  (exporter and runtime refuse in many ways, all for the same reason)
            failure = _of_the_model(error)
    assert failure is not None
    raise _refused("image", failure) from failure


def _write_text_tower(model: ViLSeg, path: Path) -> float:
    """Returns the largest difference from torch."""
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
        _write(tower, example, axes, {"tokens": ("batch", length)}, outputs, path)
        return _largest_difference(tower, batches, path)
    except Exception as error:
        raise _refused("text", _of_the_model(error)) from error


def _of_the_model(error: Exception) -> Exception:
    """``error``, unless it is one of the disk's, which goes on its way."""
    if isinstance(error, OSError) and error.errno is not None:
        raise error
    return error


def _refused(tower: str, error: BaseException) -> ModelError:
    while error.__cause__ is not None:  # the exporter wraps what it met into advice to its developers
        error = error.__cause__
    return ModelError(f"the {tower} tower cannot be written as ONNX, so nothing was written: {first_line(error)}")


def _write(
    tower: nn.Module,
    example: Tensor,
    axes: Sequence[int],
    inputs: Mapping[str, tuple[int | str, ...]],
    outputs: Mapping[str, tuple[int | str, ...]],
    path: Path,
) -> None:
    """Write a tower as ONNX; ``axes`` of its input may have any length, ``inputs`` and ``outputs`` name the axes."""
    import onnx

    with _quiet():
        traced = torch.export.export(
            tower,
            (example,),
            dynamic_shapes=(dict.fromkeys(axes, torch.export.Dim.DYNAMIC),),
            # Guards such as "not the usual size" would bind the size; what they mean for the figures is checked later.
            prefer_deferred_runtime_asserts_over_guards=True,
        )
        program = torch.onnx.export(
            traced, input_names=list(inputs), output_names=list(outputs), opset_version=OPSET, verbose=False
        )
    assert program is not None
    proto = program.model_proto
    graph = proto.graph
    for value, shape in zip([*graph.input, *graph.output], [*inputs.values(), *outputs.values()], strict=True):
        for dimension, letter in zip(value.type.tensor_type.shape.dim, shape, strict=True):
            if not dimension.HasField("dim_value"):
                dimension.dim_param = str(letter)
    # The names of this machine's files, and of axes as tracing called them.
    graph.ClearField("value_info")
    for part in [proto, graph, *graph.node, *graph.input, *graph.output, *graph.initializer]:
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    weights = sum(parameter.numel() * parameter.element_size() for parameter in tower.parameters())
    beside = weights > _LARGEST_FILE
    onnx.save_model(proto, str(path), save_as_external_data=beside, location=f"{path.name}{WEIGHTS_BESIDE}")


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter warns of packages that are not needed and of its own deprecations."""
    logs = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript")]
    levels = [log.level for log in logs]
    for log in logs:
        log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)


@contextmanager
def _one_size(encoder: nn.Module) -> Iterator[None]:
    """SigLIP 2 brings its positions to the size of every picture by itself, which would bind the number of pictures."""
    embeddings: Any = getattr(getattr(encoder, "model", None), "embeddings", None)
    resize = getattr(embeddings, "resize_positional_embeddings", None)
    if resize is None:
        yield
        return

    def once(positions: Tensor, shapes_B2: Tensor, max_length: int) -> Tensor:
        return resize(positions, shapes_B2[:1], max_length).expand(shapes_B2.shape[0], -1, -1)

    embeddings.resize_positional_embeddings = once
    try:
        yield
    finally:
        del embeddings.resize_positional_embeddings


def _largest_difference(tower: nn.Module, batches: Sequence[Tensor], path: Path) -> float:
    """Between onnxruntime and torch; ModelError where it is above `TOLERANCE`, or not a number."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what it refuses comes as an exception
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    [taken] = session.get_inputs()
    largest = 0.0
    for batch in batches:
        expected = tower(batch)
        found = session.run(None, {taken.name: batch.numpy()})
        for right, value in zip([expected] if isinstance(expected, Tensor) else expected, found, strict=True):
            difference = float(np.abs(right.numpy() - value).max()) if right.shape == value.shape else np.inf
            if not difference <= TOLERANCE:
                raise ModelError(
                    f"for an input of shape {tuple(batch.shape)} onnxruntime differs from torch by {difference:.2g}, "
                    f"more than {TOLERANCE:g}"
                )
            largest = max(largest, difference)
    return largest


def _write_tokenizer(model: ViLSeg, folder: Path) -> None:
    """The tokenizer's own files, of which ``tokenizer.json`` gives rows that the text tower takes as they are."""
    encoder = model.text_encoder
    encoder.tokenizer.save_pretrained(str(folder))
    fixed = encoder.fixed_tokenizer()
    tokenizer = Tokenizer.from_str(fixed.serialized)
    tokenizer.enable_truncation(fixed.max_tokens)
    pad: Any = encoder.tokenizer.pad_token
    length = fixed.max_tokens if encoder.fixed_length else None
    tokenizer.enable_padding(pad_id=fixed.pad_id, pad_token=pad, length=length)
    tokenizer.save(str(folder / "tokenizer.json"))


def _describe(model: ViLSeg, name: str, done: ExportResult) -> dict[str, Any]:
    """What ``export.json`` holds."""
    encoder, settings = model.text_encoder, model.segmentation
    size = {"height": done.fixed_size[0], "width": done.fixed_size[1]} if done.fixed_size else None
    bias = None if model.logit_bias is None else float(model.logit_bias)
    return {
        "format": FORMAT,
        "model": name,
        "opset": OPSET,
        "largest_difference_from_torch": done.difference,
        "embedding_dim": model.embedding_dim,
        "clusters": model.config.clusters,
        "image": {
            "file": IMAGE_TOWER,
            "input": {
                "name": "images",
                "type": "float32",
                "shape": ["B", 3, "H", "W"],
                "colours": "RGB",
                "range": [0, 1],
            },
            "input_size": settings.input_size,
            "multiple_of": patch_size(model),
            "max_aspect": settings.max_aspect,
            "fixed_size": size,
            "resize": "bicubic with antialias; shorter side input_size, longer side at most max_aspect times that, both "
            "rounded to multiple_of" + ("; or straight to fixed_size, which is all that it takes" if size else ""),
            "outputs": {
                "image_embedding": ["B", model.embedding_dim],
                "patch_embeddings": ["B", model.embedding_dim, "h", "w"],
                "assignments": ["B", model.config.clusters, "h", "w"],
            },
        },
        "text": {
            "file": TEXT_TOWER,
            "input": {"name": "tokens", "type": "int64", "shape": ["B", "T"]},
            "tokenizer": f"{TOKENIZER}/tokenizer.json",
            "max_tokens": encoder.max_tokens,
            "fixed_length": encoder.fixed_length,
            "pad_id": encoder.tokenizer.pad_token_id,
            "outputs": {"text_embedding": ["B", model.embedding_dim]},
        },
        "contrast": {"temperature": 1 / float(model.scale), "logit_bias": bias},
        "statistics": STATISTICS,
        "segmentation": settings.model_dump(mode="json"),
        "naming": list(_NAMING),
    }
