"""CLIP, SigLIP and SigLIP 2 of Hugging Face as models of ours: towers, projections and scale stay, a clustering head is new.

What becomes of an image and a text is what ``get_image_features`` and ``get_text_features`` of the original give, at unit
length. Patches take the way of the image as a whole, as far as they can; see :class:`HuggingFaceImageEncoder`, ``head``.

    CLIP      image: class token, last norm, linear projection     text: token that ends it, linear projection
    SigLIP    image: attention pooling                             text: last token of the padded row, linear map with bias

SigLIP knows no projection of images; ours begins as the identity. It was trained with a bias beside the scale, which comes
along as ``logit_bias``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from vilseg.model.text_encoder import TextEncoder
from vilseg.text.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from vilseg.model.vilseg import ViLSeg

_TOKENIZER_FILES = ("tokenizer.json", "vocab.json")
_MODEL_TYPES = ("clip", "siglip", "siglip2")


def is_clip_or_siglip(tree: Any) -> bool:
    """Whether a ``config.json`` is that of a model which this module reads."""
    return isinstance(tree, dict) and tree.get("model_type") in _MODEL_TYPES


def segmentation_config(tree: dict[str, Any]) -> SegmentationConfig:
    """Inference settings for the model: patches named by themselves, at the size that it was trained on.

    CLIP's look at those like themselves (``attention`` naclip): patches of its own last block were never asked for, and the
    papers measured the gain on it. SigLIP's stay as they are, as neither paper measured it.
    """
    size = tree.get("vision_config", {}).get("image_size")
    known: dict[str, Any] = {"input_size": size} if isinstance(size, int) else {}
    if tree.get("model_type") == "clip":
        known["attention"] = "naclip"
    return SegmentationConfig(region_weight=0.0, **known)


def load(cls: type[ViLSeg], folder: Path, source: str, *, clusters: int | None = None) -> ViLSeg:
    """Read a folder.

    Args:
        cls: what to make.
        folder: its local copy.
        source: what the user called it.
        clusters: outputs of the clustering head, whose weights are random (torch's global seed).

    Raises:
        ModelError: weights or tokenizer are missing or of another kind.
    """
    whole, tokenizer = _read(folder, source)
    clip = whole.config.model_type == "clip"
    if not clip and not whole.config.vision_config.vision_use_head:
        raise ModelError(
            f"the image tower of {source} has no pooling head, so it does not share the space of the texts"
        )
    usual = (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD) if clip else (IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD)
    mean, std = read_normalisation(str(folder), *(tuple(values) for values in usual))
    image_encoder = HuggingFaceImageEncoder(whole.vision_model, mean=mean, std=std, head=True)
    text_config = whole.config.text_config
    text_encoder = TextEncoder(
        whole.text_model, tokenizer, pooling="pooler", max_tokens=text_config.max_position_embeddings
    )
    dimension = whole.config.projection_dim if clip else text_encoder.num_features
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
    bias = None if clip else float(whole.logit_bias.detach())
    model = cls(config, image_encoder, text_encoder, segmentation=segmentation_config(tree), logit_bias=bias)
    with torch.no_grad():
        model.image_projection.bias.zero_()
        model.image_projection.weight.copy_(whole.visual_projection.weight if clip else torch.eye(dimension))
        if clip:
            assert isinstance(model.text_projection, nn.Linear)
            model.text_projection.weight.copy_(whole.text_projection.weight)
        model.logit_scale.copy_(_scalar(whole.logit_scale))
    return model


def _read(folder: Path, source: str) -> tuple[Any, Any]:
    """The model of transformers, whole and in float32, and its tokenizer."""
    try:
        whole, found = AutoModel.from_pretrained(
            str(folder), dtype=torch.float32, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError, StrictDataclassError) as error:
        raise ModelError(f"{source} cannot be loaded: {first_line(error)}") from error
    if found["missing_keys"]:
        raise ModelError(f"the weights in {source} are not whole: {min(found['missing_keys'])} is missing")
    # Without any file transformers makes one for CLIP that knows no word, and says nothing.
    if whole.config.model_type == "clip" and not any((folder / name).exists() for name in _TOKENIZER_FILES):
        raise ModelError(f"the tokenizer of {source} cannot be loaded: there is none of {', '.join(_TOKENIZER_FILES)}")
    try:
        return whole, load_tokenizer(str(folder))
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(f"the tokenizer of {source} cannot be loaded: {first_line(error)}") from error


def _scalar(value: Tensor) -> Tensor:
    return value.detach().reshape(())
