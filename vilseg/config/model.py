"""Encoders, embedding space and clustering head: a part of the run configuration."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from vilseg.config.base import ConfigPart, PositiveInt
from vilseg.config.locations import ModelRef


class ImageEncoderConfig(ConfigPart):
    """One of ``checkpoint``, ``factory``, or sizes for a network from scratch."""

    checkpoint: ModelRef | None = None
    """Folder, ``s3://`` URI or hub id of a Hugging Face vision model (its Auto class decides: ViT, DINOv2, CLIP, ConvNeXt …)."""
    factory: str | None = None
    """Import path ``module:function``; called with ``factory_options`` it returns a module with patch features."""
    factory_options: dict[str, Any] = {}
    architecture: str = "local_conv"
    """From scratch: ``local_conv`` (ours, with a small receptive field) or any ``model_type`` of transformers (``vit`` …)."""
    sizes: dict[str, Any] = {}
    """From scratch: arguments of the architecture (``local_conv``: width, depth, patch_size, kernel; others: their HF config)."""
    head: bool = False
    """Take the tokens of a CLIP, SigLIP or SigLIP 2 tower after its own head (last norm, attention pooling), as its text tower
    met them; without, the last hidden state. ``model.init`` sets it."""
    frozen: bool = False
    """Keep the encoder as it is and train only what comes after it (LiT, Zhai et al. 2022)."""

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if self.checkpoint and self.factory:
            raise ValueError("give either 'checkpoint' or 'factory', not both")
        return self


class TextEncoderConfig(ConfigPart):
    """A Hugging Face text model with its tokenizer, or a small one whose tokenizer is trained on the pairs' own captions."""

    checkpoint: ModelRef | None = None
    architecture: str = "bert"
    sizes: dict[str, Any] = {}
    """From scratch: keys of the architecture's Hugging Face configuration; for ``bert`` what is left out is small:
    hidden_size 128, num_hidden_layers 2, num_attention_heads 4, intermediate_size 512, and no dropout."""
    vocabulary_size: PositiveInt = 8192
    """Word pieces of the tokenizer trained from captions."""
    max_tokens: PositiveInt = 77
    """Longer captions are cut (77 as in CLIP)."""
    pooling: Literal["mean", "first", "pooler"] = "mean"
    """Sentence embedding: mean of the tokens (Sentence-BERT), the first token (BERT), or the model's own pooled output (CLIP)."""
    projection: Literal["linear", "identity"] = "linear"
    """``identity`` keeps the text space of a good sentence encoder and lets the images come to it."""
    frozen: bool = False


class ModelConfig(ConfigPart):
    """Both towers and the clustering head."""

    init: ModelRef | None = None
    """Start from a whole model, towers, projections and scale: folder, ``s3://`` URI or hub id of CLIP, SigLIP or SigLIP 2
    (Hugging Face), or a vilseg model folder. It decides the other keys of this part, all but ``frozen`` (and ``clusters``
    where it has no clustering head): leave them at their defaults."""
    image_encoder: ImageEncoderConfig = ImageEncoderConfig()
    text_encoder: TextEncoderConfig = TextEncoderConfig()
    embedding_dim: PositiveInt = 512
    """Shared space of images and texts (512 as CLIP ViT-B/16); the text model's own width with ``identity`` projection."""
    clusters: Annotated[int, Field(ge=2, le=1024)] = 25
    """Outputs of the clustering head; ViL-Seg compares 5 to 35."""
