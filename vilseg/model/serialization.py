"""Loading and saving of models as folders: ``config.json``, ``model.safetensors``, tokenizer files, a model card; no pickle.

Functions that load a model take the class to create as ``cls``, a subclass of :class:`~vilseg.model.network.Network`.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer

from vilseg import storage
from vilseg.config import ModelConfig, SegmentationConfig
from vilseg.config.base import flatten
from vilseg.errors import ConfigError, ModelError, UserError
from vilseg.model import clip_siglip
from vilseg.model.image_encoder import build_image_encoder, first_line
from vilseg.model.network import Model, Network
from vilseg.model.text_encoder import build_text_encoder

FORMAT = 1
_CONFIG, _WEIGHTS, _CARD = "config.json", "model.safetensors", "README.md"
_FILES = ["*.json", "*.safetensors", "*.txt", "*.md", "*.jinja"]
"""Patterns of the files to download from the Hugging Face hub; weights in other formats are not downloaded."""


def save(model: Network, uri: str, *, card: str | None = None, weights: Mapping[str, Tensor] | None = None) -> None:
    """Write ``model`` as a folder at ``uri``; ``config.json`` is written last, so a folder without it is incomplete.

    Args:
        model: model to write.
        uri: path or URI of the folder.
        card: text of its ``README.md``; None writes a title only.
        weights: full tensors by name, written instead of the model's own weights; needed if ``model`` holds only local shards.
    """
    tree: dict[str, Any] = {
        "format": FORMAT,
        "model": model.config.model_dump(mode="json"),
        "segmentation": model.segmentation.model_dump(mode="json"),
        "image_encoder": getattr(model.image_encoder, "hf_config", None),
        "text_encoder": model.text_encoder.hf_config,
    }
    with tempfile.TemporaryDirectory() as folder:
        model.text_encoder.tokenizer.save_pretrained(folder)
        full = model.state_dict() if weights is None else weights
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in full.items()}
        save_file(tensors, Path(folder) / _WEIGHTS, metadata={"format": "pt"})
        (Path(folder) / _CARD).write_text(card or "# vilseg model\n", encoding="utf-8")
        storage.upload_folder(Path(folder), uri)
    storage.write_text(storage.join(uri, _CONFIG), json.dumps(tree, indent=2))


def load(cls: type[Model], source: str, *, clusters: int | None = None) -> Model:
    """Read a model folder; see :meth:`vilseg.ViLSeg.from_pretrained`.

    Args:
        cls: class to create.
        source: path, URI or hub id.
        clusters: number of outputs of the clustering head that is added to a model without one (CLIP, SigLIP); None takes the
            default of ``ModelConfig``.
    """
    with ExitStack() as stack:
        folder = _local_folder(source, stack)
        if clip_siglip.is_clip_or_siglip(_read_json(folder, source)):
            return clip_siglip.load(cls, folder, source, clusters=clusters).eval()
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
        bias = weights.get("logit_bias")
        model = cls(
            config,
            image_encoder,
            text_encoder,
            segmentation=segmentation,
            logit_bias=None if bias is None else bias.item(),
        )
        try:
            model.load_state_dict(weights)
        except RuntimeError as error:
            # The first line of torch's message is a heading; the next one has the names of the tensors.
            names = " ".join(str(error).split("\n")[1].split())[:200]
            raise ModelError(f"the weights in {source} do not fit its {_CONFIG}: {names}") from error
    return model.eval()


_RUN_KEYS = ("init", "image_encoder.frozen", "text_encoder.frozen")
"""Keys of ``ModelConfig`` whose values may differ from those of the model that a run starts from."""


def load_initial(cls: type[Model], config: ModelConfig, *, segmentation: SegmentationConfig | None = None) -> Model:
    """Load the model at ``config.init`` as the start of a training run; see :meth:`vilseg.ViLSeg.from_config`.

    Raises:
        ConfigError: ``config`` has a value that is neither the default nor that of the model.
        ModelError: the model cannot be loaded.
    """
    assert config.init is not None
    try:
        initial = load(cls, config.init, clusters=config.clusters)
    except ModelError as error:
        raise ModelError(f"model.init cannot be taken: {error}") from error
    asked, defaults, loaded = (flatten(part.model_dump()) for part in (config, ModelConfig(), initial.config))
    for key, value in asked.items():
        if key not in _RUN_KEYS and value not in (defaults.get(key), loaded.get(key)):
            has = f"has {loaded[key]!r}" if key in loaded else "has no such key"
            raise ConfigError(f"model.{key} is {value!r}, but model.init {config.init} {has}; leave the key away")
    encoders = {
        name: getattr(initial.config, name).replace(frozen=getattr(config, name).frozen)
        for name in ("image_encoder", "text_encoder")
    }
    initial.requires_grad_(True)
    model = cls(
        initial.config.replace(**encoders),
        initial.image_encoder,
        initial.text_encoder,
        segmentation=segmentation,
        logit_bias=None if initial.logit_bias is None else initial.logit_bias.item(),
    )
    model.load_state_dict(initial.state_dict())
    model.train()
    return model


def read_segmentation_config(source: str) -> SegmentationConfig:
    """Read the inference settings that are saved with a model, without loading its weights.

    Raises:
        ModelError: ``source`` is not a model folder.
    """
    with ExitStack() as stack:
        folder = source if storage.exists(source) else str(_local_folder(source, stack))
        tree = _read_json(folder, source)
        return (
            clip_siglip.segmentation_config(tree)
            if clip_siglip.is_clip_or_siglip(tree)
            else _read_config(folder, source)[2]
        )


def _read_json(folder: str | Path, source: str) -> Any:
    uri = storage.join(str(folder), _CONFIG)
    if not storage.exists(uri):
        raise ModelError(f"{source} is not a model folder: it has no {_CONFIG}")
    try:
        return json.loads(storage.read_text(uri))
    except ValueError as error:
        raise ModelError(_not_ours_message(source, error)) from error


def _read_config(folder: str | Path, source: str) -> tuple[dict[str, Any], ModelConfig, SegmentationConfig]:
    tree = _read_json(folder, source)
    try:
        if tree["format"] != FORMAT:
            raise ModelError(
                f"{source} is a model folder of format {tree['format']}; this vilseg reads format {FORMAT}"
            )
        if not {"image_encoder", "text_encoder"} <= tree.keys():
            raise KeyError("image_encoder, text_encoder")
        return tree, ModelConfig.model_validate(tree["model"]), SegmentationConfig.model_validate(tree["segmentation"])
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        raise ModelError(_not_ours_message(source, error)) from error


def _not_ours_message(source: str, error: Exception) -> str:
    return f"{source} is not a vilseg model folder: its {_CONFIG} has no vilseg model ({first_line(error)})"


def _local_folder(source: str, stack: ExitStack) -> Path:
    if storage.exists(source):
        return stack.enter_context(storage.local_copy(source))
    if "://" in source or source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise ModelError(f"there is no model folder at {source}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(source, allow_patterns=_FILES))
    except (OSError, HfHubHTTPError, HFValidationError, UserError) as error:
        raise ModelError(
            f"{source} is neither a folder nor a model that the hub would give: {first_line(error)}"
        ) from error
