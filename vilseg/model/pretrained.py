"""The model folder: ``config.json``, ``model.safetensors``, tokenizer files and a model card; no pickle anywhere."""

from __future__ import annotations

import json
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from vilseg import storage
from vilseg.config import ModelConfig, SegmentationConfig
from vilseg.errors import ModelError, UserError
from vilseg.model.image_encoder import build_image_encoder, first_line
from vilseg.model.text_encoder import build_text_encoder

if TYPE_CHECKING:
    from vilseg.model.vilseg import ViLSeg

FORMAT = 1
_CONFIG, _WEIGHTS, _CARD = "config.json", "model.safetensors", "README.md"


def save(model: ViLSeg, uri: str, *, card: str | None = None) -> None:
    """Write ``model`` as a folder at ``uri``. ``config.json`` comes last: a folder without it is no model."""
    tree: dict[str, Any] = {
        "format": FORMAT,
        "model": model.config.model_dump(mode="json"),
        "segmentation": model.segmentation.model_dump(mode="json"),
        "image_encoder": getattr(model.image_encoder, "hf_config", None),
        "text_encoder": model.text_encoder.hf_config,
    }
    with tempfile.TemporaryDirectory() as folder:
        model.text_encoder.tokenizer.save_pretrained(folder)
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
        save_file(weights, Path(folder) / _WEIGHTS, metadata={"format": "pt"})
        (Path(folder) / _CARD).write_text(card or "# vilseg model\n", encoding="utf-8")
        storage.upload_folder(Path(folder), uri)
    storage.write_text(storage.join(uri, _CONFIG), json.dumps(tree, indent=2))


def load(cls: type[ViLSeg], source: str) -> ViLSeg:
    """Read a model folder; see :meth:`ViLSeg.from_pretrained`."""
    with ExitStack() as stack:
        folder = _folder(source, stack)
        tree, config, segmentation = _read_config(folder, source)
        try:
            weights = load_file(folder / _WEIGHTS)
        except (OSError, SafetensorError) as error:
            raise ModelError(f"the model folder {source} is damaged: {_WEIGHTS}: {first_line(error)}") from error
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError) as error:
            raise ModelError(f"the model folder {source} is damaged: its tokenizer: {first_line(error)}") from error
        image_encoder = build_image_encoder(config.image_encoder, hf_config=tree["image_encoder"])
        text_encoder = build_text_encoder(config.text_encoder, tokenizer=tokenizer, hf_config=tree["text_encoder"])
        model = cls(config, image_encoder, text_encoder, segmentation=segmentation)
        try:
            model.load_state_dict(weights)
        except RuntimeError as error:
            # Torch's first line is a heading; the names are in the next.
            names = " ".join(str(error).split("\n")[1].split())[:200]
            raise ModelError(f"the weights in {source} do not fit its {_CONFIG}: {names}") from error
    return model.eval()


def read_settings(source: str) -> SegmentationConfig:
    """The inference settings that a model carries, without its weights.

    Raises:
        ModelError: no model folder.
    """
    if storage.exists(source):
        return _read_config(source, source)[2]
    with ExitStack() as stack:
        return _read_config(str(_folder(source, stack)), source)[2]


def _read_config(folder: str | Path, source: str) -> tuple[dict[str, Any], ModelConfig, SegmentationConfig]:
    uri = storage.join(str(folder), _CONFIG)
    if not storage.exists(uri):
        raise ModelError(f"{source} is not a model folder: it has no {_CONFIG}")
    try:
        tree = json.loads(storage.read_text(uri))
        if tree["format"] != FORMAT:
            raise ModelError(
                f"{source} is a model folder of format {tree['format']}; this vilseg reads format {FORMAT}"
            )
        if not {"image_encoder", "text_encoder"} <= tree.keys():
            raise KeyError("image_encoder, text_encoder")
        return tree, ModelConfig.model_validate(tree["model"]), SegmentationConfig.model_validate(tree["segmentation"])
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        raise ModelError(
            f"{source} is not a vilseg model folder: its {_CONFIG} has no vilseg model ({first_line(error)})"
        ) from error


def _folder(source: str, stack: ExitStack) -> Path:
    if storage.exists(source):
        return stack.enter_context(storage.local_copy(source))
    if "://" in source or source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise ModelError(f"there is no model folder at {source}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(source))
    except (OSError, HfHubHTTPError, HFValidationError, UserError) as error:
        raise ModelError(
            f"{source} is neither a folder nor a model that the hub would give: {first_line(error)}"
        ) from error
