"""CLIP, SigLIP and SigLIP 2 checkpoints of Hugging Face as vilseg models, with a new, untrained clustering head.

Embeddings of images and texts equal ``get_image_features`` and ``get_text_features`` of the original, scaled to unit length.
Patches go through the same layers as the global feature as far as possible; see ``head`` of :class:`HuggingFaceImageEncoder`.
The global features are:

    CLIP      image: class token, last norm, linear projection     text: end-of-text token, linear projection
    SigLIP    image: attention pooling                             text: last token of the padded row, linear layer with bias

SigLIP has no image projection; that of the vilseg model is initialised as the identity. SigLIP's learnt bias of the logits
becomes ``logit_bias``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModel
from transformers.image_utils import (
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)

from vilseg.config import ImageEncoderConfig, ModelConfig, SegmentationConfig, TextEncoderConfig
from vilseg.errors import ModelError
from vilseg.model.image_encoder import HuggingFaceImageEncoder, first_line, read_normalisation
from vilseg.model.network import Model
from vilseg.model.text_encoder import TextEncoder
from vilseg.text.tokenizer import load_tokenizer

_TOKENIZER_FILES = ("tokenizer.json", "vocab.json")
_MODEL_TYPES = ("clip", "siglip", "siglip2")


def is_clip_or_siglip(tree: Any) -> bool:
    """Return True if ``tree`` is the content of ``config.json`` of a CLIP, SigLIP or SigLIP 2 model."""
    return isinstance(tree, dict) and tree.get("model_type") in _MODEL_TYPES


def segmentation_config(tree: dict[str, Any]) -> SegmentationConfig:
    """Return inference settings for the model: each patch is classified separately, at the image size of the model's training.

    CLIP gets ``attention`` naclip, because its own last block was not trained for patches, and the papers on SCLIP and NACLIP
    (see ``correlated_attention``) measured a gain on CLIP. SigLIP keeps its own attention, because neither paper measured other
    variants on it.

    Args:
        tree: content of the model's ``config.json``.
    """
    size = tree.get("vision_config", {}).get("image_size")
    known: dict[str, Any] = {"input_size": size} if isinstance(size, int) else {}
    if tree.get("model_type") == "clip":
        known["attention"] = "naclip"
    return SegmentationConfig(region_weight=0.0, **known)


def load(cls: type[Model], folder: Path, source: str, *, clusters: int | None = None) -> Model:
    """Load a CLIP, SigLIP or SigLIP 2 model from a local folder.

    Args:
        cls: class to create.
        folder: local copy of the model folder.
        source: path, URI or hub id that the user gave, for error messages.
        clusters: number of outputs of the clustering head, whose weights are random (torch's global seed); None takes the
            default of ``ModelConfig``.

    Raises:
        ModelError: weights or tokenizer are missing or cannot be loaded, or images and texts have no common embedding space.
    """
    original, tokenizer = _read(folder, source)
    clip = original.config.model_type == "clip"
    if not clip and not original.config.vision_config.vision_use_head:
        raise ModelError(
            f"the image tower of {source} has no pooling head, so it does not share the space of the texts"
        )
    usual = (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD) if clip else (IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD)
    mean, std = read_normalisation(str(folder), *(tuple(values) for values in usual))
    image_encoder = HuggingFaceImageEncoder(original.vision_model, mean=mean, std=std, head=True)
    text_config = original.config.text_config
    text_encoder = TextEncoder(
        original.text_model, tokenizer, pooling="pooler", max_tokens=text_config.max_position_embeddings
    )
    dimension = original.config.projection_dim if clip else text_encoder.num_features
    if not clip and dimension != image_encoder.num_features:
        raise ModelError(
            f"the towers of {source} do not meet: images have {image_encoder.num_features} numbers, texts {dimension}"
        )
    head: dict[str, Any] = {} if clusters is None else {"clusters": clusters}
    config = ModelConfig(
        image_encoder=ImageEncoderConfig(head=True),
        text_encoder=TextEncoderConfig(
            max_tokens=text_encoder.max_tokens, pooling="pooler", projection="linear" if clip else "identity"
        ),
        embedding_dim=dimension,
        **head,
    )
    tree = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    bias = None if clip else float(original.logit_bias.detach())
    model = cls(config, image_encoder, text_encoder, segmentation=segmentation_config(tree), logit_bias=bias)
    with torch.no_grad():
        model.image_projection.bias.zero_()
        model.image_projection.weight.copy_(original.visual_projection.weight if clip else torch.eye(dimension))
        if clip:
            assert isinstance(model.text_projection, nn.Linear)
            model.text_projection.weight.copy_(original.text_projection.weight)
        model.logit_scale.copy_(_scalar(original.logit_scale))
    return model


def _read(folder: Path, source: str) -> tuple[Any, Any]:
    """Load the complete transformers model in float32, and its tokenizer."""
    try:
        original, loading_info = AutoModel.from_pretrained(
            str(folder), dtype=torch.float32, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError, StrictDataclassError) as error:
        raise ModelError(f"{source} cannot be loaded: {first_line(error)}") from error
    if loading_info["missing_keys"]:
        raise ModelError(f"the weights in {source} are not whole: {min(loading_info['missing_keys'])} is missing")
    # Without a tokenizer file transformers silently makes an empty one for CLIP.
    if original.config.model_type == "clip" and not any((folder / name).exists() for name in _TOKENIZER_FILES):
        raise ModelError(f"the tokenizer of {source} cannot be loaded: there is none of {', '.join(_TOKENIZER_FILES)}")
    try:
        return original, load_tokenizer(str(folder))
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(f"the tokenizer of {source} cannot be loaded: {first_line(error)}") from error


def _scalar(value: Tensor) -> Tensor:
    return value.detach().reshape(())
