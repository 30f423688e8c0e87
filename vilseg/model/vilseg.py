"""ViLSeg: images, their patches and texts in one space, and a clustering head that cuts images into regions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from vilseg.config import ModelConfig, SegmentationConfig
from vilseg.errors import ConfigError
from vilseg.model import serialization
from vilseg.model.image_encoder import ImageFeatures, build_image_encoder
from vilseg.model.text_encoder import TextEncoder, build_text_encoder
from vilseg.text.tokenizer import train_tokenizer

MAX_LOGIT_SCALE = math.log(100.0)
"""Cap of the inverse temperature (CLIP, Radford et al. 2021, section 2.5)."""


class ImageEmbeddings(NamedTuple):
    """Images in the text space; every embedding has unit length."""

    pooled: Float[Tensor, "B D"]
    """(B, D), the image as a whole."""
    patches: Float[Tensor, "B N D"]
    """(B, N, D), row by row over the grid."""
    grid: tuple[int, int]


class ViLSeg(nn.Module):
    """The model of ViL-Seg (arXiv 2207.08455, section 3): two encoders, their projections, and the online clustering head.

    Make one with :meth:`from_config` or :meth:`from_pretrained`.
    """

    logit_bias: nn.Parameter | None
    caption_mean: Float[Tensor, " D"]
    patch_mean: Float[Tensor, " D"]
    patch_covariance: Float[Tensor, "D D"]
    recorded_steps: Int[Tensor, ""]

    def __init__(
        self,
        config: ModelConfig,
        image_encoder: nn.Module,
        text_encoder: TextEncoder,
        *,
        segmentation: SegmentationConfig | None = None,
        temperature: float = 0.07,
        logit_bias: float | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.segmentation = segmentation or SegmentationConfig()
        self.image_encoder = image_encoder
        self.text_encoder = text_encoder
        features = int(image_encoder.num_features)  # type: ignore[arg-type]
        identity = config.text_encoder.projection == "identity"
        self.embedding_dim = text_encoder.num_features if identity else config.embedding_dim
        self.image_projection = nn.Linear(features, self.embedding_dim)
        self.text_projection = (
            nn.Identity() if identity else nn.Linear(text_encoder.num_features, self.embedding_dim, bias=False)
        )
        self.clustering_head = nn.Sequential(nn.LayerNorm(features), nn.Linear(features, config.clusters))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / temperature)))
        self.register_parameter("logit_bias", None if logit_bias is None else nn.Parameter(torch.tensor(logit_bias)))
        """Learnt shift of the logits (SigLIP, Zhai et al. 2023, section 3.2), where the model was trained with one."""
        self.register_buffer("caption_mean", torch.zeros(self.embedding_dim))
        """Mean embedding of the captions seen in training; see ``SegmentationConfig.center_text``."""
        self.register_buffer("patch_mean", torch.zeros(self.embedding_dim))
        self.register_buffer("patch_covariance", torch.eye(self.embedding_dim) / self.embedding_dim)
        """Mean and covariance of the patch embeddings; until training records them, unit vectors of all directions."""
        self.register_buffer("recorded_steps", torch.zeros((), dtype=torch.long))
        """Steps whose captions and patches are in the three statistics above."""
        if config.image_encoder.frozen:
            image_encoder.requires_grad_(False)
        if config.text_encoder.frozen:
            text_encoder.requires_grad_(False)
        self.check_attention()

    @classmethod
    def from_config(
        cls,
        config: ModelConfig,
        captions: Sequence[str] = (),
        *,
        segmentation: SegmentationConfig | None = None,
        temperature: float = 0.07,
    ) -> ViLSeg:
        """A new model, its checkpoints loaded and the rest at random (torch's global seed).

        Args:
            config: encoders and sizes.
            captions: sample that a tokenizer is trained on where the text encoder has no checkpoint.
            segmentation: inference settings that the model carries.
            temperature: start of the learnt temperature; with ``config.init`` that model's own stays.

        Raises:
            ConfigError: sizes that cannot be, or others than those of ``config.init``; see the encoders.
            ModelError: a checkpoint cannot be loaded.
        """
        if config.init:
            return serialization.load_initial(cls, config, segmentation=segmentation)
        tokenizer = None
        if not config.text_encoder.checkpoint:
            tokenizer = train_tokenizer(captions, config.text_encoder.vocabulary_size)
        image_encoder = build_image_encoder(config.image_encoder)
        text_encoder = build_text_encoder(config.text_encoder, tokenizer=tokenizer)
        return cls(config, image_encoder, text_encoder, segmentation=segmentation, temperature=temperature)

    @classmethod
    def from_pretrained(cls, source: str) -> ViLSeg:
        """Load a model folder: a path, an ``s3://`` URI or a hub id. Safetensors only; nothing is unpickled.

        Folders of CLIP, SigLIP and SigLIP 2 (Hugging Face) are taken too. Their clustering head is untrained, so their
        settings name every patch by itself (``region_weight`` 0), CLIP's with a last block in which patches look at those
        like themselves (``attention`` naclip); train with ``model.init`` to get regions.

        A model with a ``factory`` has that function imported and called with options of the folder's choice, so load
        only folders that you trust.

        Raises:
            ConfigError: the model's factory cannot be imported, or is none.
            ModelError: no model folder there, or its weights do not fit its configuration.
            StorageError: the URI cannot be read.
        """
        return serialization.load(cls, source)

    def save_pretrained(
        self, uri: str, *, card: str | None = None, weights: Mapping[str, Tensor] | None = None
    ) -> None:
        """Write the model folder: ``config.json``, ``model.safetensors``, tokenizer files, ``README.md`` (the card).

        ``weights``, by their names, take the place of the model's own where a worker holds only parts of them.
        """
        serialization.save(self, uri, card=card, weights=weights)

    def train(self, mode: bool = True) -> ViLSeg:
        """Training mode for what is trained; frozen towers stay in evaluation mode."""
        super().train(mode)
        if self.config.image_encoder.frozen:
            self.image_encoder.eval()
        if self.config.text_encoder.frozen:
            self.text_encoder.eval()
        return self

    def checkpoint_activations(self) -> None:
        """From now on keep only what goes into the encoders' blocks, and compute the rest again in the backward pass.

        Frozen encoders have no backward pass and stay as they are.

        Raises:
            ConfigError: an encoder has no blocks that can be computed again.
        """
        for key, encoder in (("image_encoder", self.image_encoder), ("text_encoder", self.text_encoder)):
            if getattr(self.config, key).frozen:
                continue
            if not hasattr(encoder, "checkpoint_activations"):
                raise ConfigError(
                    f"trainer.checkpoint_activations cannot be used: the module of model.{key}.factory has no method "
                    "of that name; write one, or set trainer.checkpoint_activations=false"
                )
            encoder.checkpoint_activations()  # type: ignore[operator]

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.logit_scale.device

    @property
    def scale(self) -> Tensor:
        """Inverse temperature of the contrast, at most 100; SigLIP's, which comes with a bias, has no cap and is often above."""
        if self.logit_bias is not None:
            return self.logit_scale.exp()
        return self.logit_scale.clamp(max=MAX_LOGIT_SCALE).exp()

    def image_features(self, images: Float[Tensor, "B 3 H W"]) -> ImageFeatures:
        """Features of the image encoder. Shape: (B, 3, H, W) RGB in 0..1 -> patches (B, N, F)."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.config.image_encoder.frozen):
            return self.image_encoder(images)

    def check_attention(self) -> None:
        """Raise ConfigError where the settings want an attention that the image encoder's last block cannot have."""
        attention = self.segmentation.attention
        if attention == "plain" or getattr(self.image_encoder, "can_correlate", False):
            return
        part = self.config.image_encoder
        kind = getattr(self.image_encoder, "hf_config", {}).get("model_type") or part.factory or part.architecture
        raise ConfigError(
            f"segmentation.attention is '{attention}', but the image encoder ({kind}) has no last block that it could be put "
            "into; CLIP, SigLIP, SigLIP 2, DINOv2 and ViT have one, for all others set segmentation.attention=plain"
        )

    def dense_features(
        self, images: Float[Tensor, "B 3 H W"], attention: Literal["plain", "sclip", "naclip"]
    ) -> tuple[ImageFeatures, Float[Tensor, "B N F"]]:
        """Features of the image encoder as it was trained, and the patches that are to be named; one pass.

        Args:
            images: RGB in 0..1. Shape: (B, 3, H, W).
            attention: of the last block, for the patches to be named; with ``plain`` they are those of the features.
                Another needs a model that `check_attention` lets pass.

        Returns:
            The features, whose patches the clustering head knows, and patches (B, N, F).
        """
        if attention == "plain":
            features = self.image_features(images)
            return features, features.patches
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.config.image_encoder.frozen):
            return self.image_encoder.correlated(images, attention)  # type: ignore[operator]  # checked before

    def embed(self, features: ImageFeatures) -> ImageEmbeddings:
        """Bring features into the text space."""
        return ImageEmbeddings(self.embed_pooled(features), self.embed_patches(features), features.grid)

    def embed_pooled(self, features: ImageFeatures) -> Float[Tensor, "B D"]:
        """Bring the images as wholes into the text space. Shape: -> (B, D), unit length."""
        pooled_BF = features.patches.mean(1) if features.pooled is None else features.pooled
        return F.normalize(self.image_projection(pooled_BF), dim=-1)

    def embed_patches(self, features: ImageFeatures) -> Float[Tensor, "B N D"]:
        """Bring the patches into the text space. Shape: -> (B, N, D), unit length."""
        return F.normalize(self.image_projection(features.patches), dim=-1)

    def cluster_logits(self, features: ImageFeatures) -> Float[Tensor, "B N K"]:
        """What the head thinks of every patch. Shape: -> (B, N, K)."""
        return self.clustering_head(features.patches)

    def encode_image(self, images: Float[Tensor, "B 3 H W"]) -> ImageEmbeddings:
        """Global and patch embeddings. Shape: (B, 3, H, W) RGB in 0..1 -> (B, D) and (B, N, D), unit length."""
        return self.embed(self.image_features(images))

    def assignments(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B K h w"]:
        """Soft cluster assignments of the patches. Shape: (B, 3, H, W) -> (B, K, h, w), summing to 1 over K."""
        features = self.image_features(images)
        h, w = features.grid
        return self.cluster_logits(features).softmax(-1).transpose(1, 2).unflatten(2, (h, w))

    def text_features(self, tokens: Int[Tensor, "B T"]) -> Float[Tensor, "B F"]:
        """Features of the text encoder. Shape: (B, T) -> (B, F)."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.config.text_encoder.frozen):
            return self.text_encoder(tokens)

    def embed_text(self, features_BF: Float[Tensor, "B F"]) -> Float[Tensor, "B D"]:
        """Bring text features into the shared space. Shape: (B, F) -> (B, D), unit length."""
        return F.normalize(self.text_projection(features_BF), dim=-1)

    def encode_text(self, texts: Sequence[str] | Int[Tensor, "B T"]) -> Float[Tensor, "B D"]:
        """Embeddings of texts, or of token rows. Shape: texts (B) or (B, T) -> (B, D), unit length."""
        tokens = texts if isinstance(texts, Tensor) else self.text_encoder.tokenize(texts)
        return self.embed_text(self.text_features(tokens.to(self.device)))
