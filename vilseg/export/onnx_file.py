"""Writing of a torch module as an ONNX file, and comparison of the file's outputs in onnxruntime with the module's."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vilseg.errors import ModelError
from vilseg.export.output_directory import WEIGHTS_BESIDE
from vilseg.model.image_encoder import first_line

OPSET = 18
"""ONNX opset version: the one that torch's exporter writes, so no conversion is needed. Runtimes since 2023 support it."""
TOLERANCE = 1e-4
"""Maximum accepted absolute difference between an output and that of torch; all outputs are in -1..1."""

_LARGEST_FILE = 1_900_000_000
"""Maximum number of bytes of weights in the ONNX file itself (protobuf is limited to 2 GiB); more go into a second file."""


def write_onnx(
    tower: nn.Module,
    example: Tensor,
    axes: Sequence[int],
    inputs: Mapping[str, tuple[int | str, ...]],
    outputs: Mapping[str, tuple[int | str, ...]],
    path: Path,
) -> None:
    """Write a module as an ONNX file.

    Args:
        tower: module with one input tensor.
        example: input that the module is traced with.
        axes: indices of the input's axes that may have any length.
        inputs: name of the input, mapped to the size or the name of each of its axes.
        outputs: name of each output, mapped to the sizes or names of its axes.
        path: path of the file; weights that are too large for it go into a second file in the same directory.
    """
    import onnx

    with _quiet_exporter():
        traced = torch.export.export(
            tower,
            (example,),
            dynamic_shapes=(dict.fromkeys(axes, torch.export.Dim.DYNAMIC),),
            # Guards such as "size differs from the default" would fix the size. `largest_difference` checks other sizes later.
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
    # Remove paths of this machine, and names that tracing gave to axes.
    graph.ClearField("value_info")
    for part in [proto, graph, *graph.node, *graph.input, *graph.output, *graph.initializer]:
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    weights = sum(parameter.numel() * parameter.element_size() for parameter in tower.parameters())
    beside = weights > _LARGEST_FILE
    onnx.save_model(proto, str(path), save_as_external_data=beside, location=f"{path.name}{WEIGHTS_BESIDE}")


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Silence the exporter's warnings within the ``with`` block: of unneeded packages, and of its own deprecations."""
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
def fixed_positions(encoder: nn.Module) -> Iterator[None]:
    """Make SigLIP 2 interpolate its position embeddings once for the whole batch, within the ``with`` block.

    Its own loop over the images would fix the batch size in a trace. Other encoders are unchanged.
    """
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


def largest_difference(tower: nn.Module, batches: Sequence[Tensor], path: Path) -> float:
    """Return the largest absolute difference between the outputs of onnxruntime and torch, over all outputs and batches.

    Args:
        tower: the torch module.
        batches: input tensors that both compute the outputs for.
        path: ONNX file of the module.

    Raises:
        ModelError: a difference is above `TOLERANCE` or NaN, or the shape of an output differs from torch's.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # errors are raised as exceptions
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


def reraise_disk_error(error: Exception) -> Exception:
    """Return ``error``, or raise it if it is a file system error, because such an error says nothing about the model."""
    if isinstance(error, OSError) and error.errno is not None:
        raise error
    return error


def export_error(tower: str, error: BaseException) -> ModelError:
    """Return a ModelError for a tower that cannot be exported, with the message of the innermost cause of ``error``."""
    while error.__cause__ is not None:  # the exporter wraps the cause into advice for its developers
        error = error.__cause__
    return ModelError(f"the {tower} tower cannot be written as ONNX, so nothing was written: {first_line(error)}")
