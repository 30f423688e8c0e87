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
        if not (folder / _CONFIG).is_file():
            raise ModelError(f"{source} is not a model folder: it has no {_CONFIG}")
        try:
            tree = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
            config = ModelConfig.model_validate(tree["model"])
            segmentation = SegmentationConfig.model_validate(tree["segmentation"])
        except (ValueError, KeyError, TypeError, ValidationError) as error:
            raise ModelError(
                f"{source} is not a vilseg model folder: its {_CONFIG} has no vilseg model ({first_line(error)})"
            ) from error
        try:
            weights = load_file(folder / _WEIGHTS)
            tokenizer = AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError, SafetensorError) as error:
            raise ModelError(f"the model folder {source} is damaged: {first_line(error)}") from error
        image_encoder = build_image_encoder(config.image_encoder, hf_config=tree["image_encoder"])
        text_encoder = build_text_encoder(config.text_encoder, tokenizer=tokenizer, hf_config=tree["text_encoder"])
        model = cls(config, image_encoder, text_encoder, segmentation=segmentation)
        try:
            model.load_state_dict(weights)
        except RuntimeError as error:
            raise ModelError(f"the weights in {source} do not fit its {_CONFIG}: {first_line(error)}") from error
    return model.eval()


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
        raise ModelError(f"{source} is neither a folder nor a model that the hub would give: {first_line(error)}") from error
