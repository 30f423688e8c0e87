"""Configuration of the encoders, the embedding space and the clustering head."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from vilseg.config.base import ConfigPart, PositiveInt
from vilseg.config.locations import ModelRef


class ImageEncoderConfig(ConfigPart):
    """Image encoder from a ``checkpoint``, from a ``factory`` function, or from scratch by ``architecture`` and ``sizes``."""

    checkpoint: ModelRef | None = None
    """Folder, ``s3://`` URI or hub id of a Hugging Face vision model that its Auto class can load (ViT, DINOv2, CLIP, ConvNeXt
    …)."""
    factory: str | None = None
    """Import path ``module:function``; the function is called with ``factory_options`` and returns a torch module that
    computes patch features, as ``vilseg.model.image_encoder`` describes."""
    factory_options: dict[str, Any] = {}
    architecture: str = "local_conv"
    """Architecture of a network trained from scratch: ``local_conv`` (our own convolutional network with a small receptive field)
    or any ``model_type`` of transformers (``vit`` …)."""
    sizes: dict[str, Any] = {}
    """Arguments of ``architecture`` for training from scratch: width, depth, patch_size and kernel of ``local_conv``, otherwise
    keys of the Hugging Face configuration."""
    head: bool = False
    """If true, take the tokens of a CLIP, SigLIP or SigLIP 2 image tower after its own head (last norm, attention pooling), which
    is the space that its text tower was trained against; otherwise take the last hidden state. ``model.init`` sets this key."""
    frozen: bool = False
    """If true, keep the encoder's weights fixed and train only the layers after it (LiT, Zhai et al. 2022)."""

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if self.checkpoint and self.factory:
            raise ValueError("give either 'checkpoint' or 'factory', not both")
        return self


class TextEncoderConfig(ConfigPart):
    """Hugging Face text model with its tokenizer, or a model from scratch with a tokenizer trained on the captions."""

    checkpoint: ModelRef | None = None
    architecture: str = "bert"
    sizes: dict[str, Any] = {}
    """Keys of the Hugging Face configuration of ``architecture`` for training from scratch. The defaults for ``bert`` are
    hidden_size 128, num_hidden_layers 2, num_attention_heads 4, intermediate_size 512 and no dropout."""
    vocabulary_size: PositiveInt = 8192
    """Maximum number of word pieces of the tokenizer that is trained on captions."""
    max_tokens: PositiveInt = 77
    """Maximum number of tokens of a caption; longer captions are truncated (77 as in CLIP)."""
    pooling: Literal["mean", "first", "pooler"] = "mean"
    """Sentence embedding: mean of the tokens (Sentence-BERT), the first token (BERT), or the model's own pooled output (CLIP)."""
    projection: Literal["linear", "identity"] = "linear"
    """Projection of texts into the embedding space. ``identity`` keeps the text model's own space, to which the images are
    aligned."""
    frozen: bool = False


class ModelConfig(ConfigPart):
    """Image tower, text tower and clustering head."""

    init: ModelRef | None = None
    """Model to start from, with its towers, projections and logit scale: folder, ``s3://`` URI or hub id of CLIP, SigLIP or
    SigLIP 2 (Hugging Face), or a vilseg model folder. It determines the other keys of this section, which must keep their
    defaults, except ``frozen``, and ``clusters`` if the model has no clustering head."""
    image_encoder: ImageEncoderConfig = ImageEncoderConfig()
    text_encoder: TextEncoderConfig = TextEncoderConfig()
    embedding_dim: PositiveInt = 512
    """Dimension of the embedding space of images and texts (512 as in CLIP ViT-B/16); if the text projection is ``identity``, the
    width of the text model."""
    clusters: Annotated[int, Field(ge=2, le=1024)] = 25
    """Number of outputs of the clustering head; the ViL-Seg paper compares 5 to 35."""
