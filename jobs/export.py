"""Export of a model to ONNX: image tower with clustering head, text tower, tokenizer, and a description."""

from __future__ import annotations

from collections.abc import Callable

from vilseg import storage
from vilseg.config import SegmentationConfig
from vilseg.export.onnx_export import ExportResult, export_model, require_packages
from vilseg.export.output_directory import check_target
from vilseg.model import ViLSeg


def main(
    model: str,
    out: str,
    *,
    overwrite: bool = False,
    settings: Callable[[SegmentationConfig], SegmentationConfig] = lambda settings: settings,
    say: Callable[[str], None] = lambda text: None,
) -> ExportResult:
    """Export ``model`` to ``out``.

    Args:
        model: URI of a model folder.
        out: folder or URI for the files.
        overwrite: replace an existing export at ``out``.
        settings: function that changes the inference settings stored with the model.
        say: function called with each progress message.

    Raises:
        ModelError: ``model`` is not a model folder, or the outputs of the ONNX files differ from torch's by more than 1e-4.
        StorageError: a URI cannot be reached, or ``out`` exists.
        UserError: a package of the extra ``export`` is missing.
    """
    require_packages()
    storage.require_bucket(model)
    check_target(out, overwrite=overwrite)
    loaded = ViLSeg.from_pretrained(model)
    loaded.segmentation = settings(loaded.segmentation)
    return export_model(loaded, out, name=model, overwrite=overwrite, say=say)
