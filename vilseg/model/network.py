"""Network of ViLSeg: embeddings of images, patches and texts in one space, and the head that clusters patches into regions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from vilseg.config import ModelConfig, SegmentationConfig
from vilseg.errors import ConfigError
from vilseg.model.image_encoder import ImageFeatures
from vilseg.model.text_encoder import TextEncoder

MAX_LOGIT_SCALE = math.log(100.0)
"""Maximum of the learnt log of the inverse temperature (CLIP, Radford et al. 2021, section 2.5)."""


class ImageEmbeddings(NamedTuple):
    """Image embeddings in the space shared with texts; each has unit length."""

    pooled: Float[Tensor, "B D"]
    """(B, D), global embedding of each image."""
    patches: Float[Tensor, "B N D"]
    """(B, N, D), embedding of each patch, in row-major order of the grid."""
    grid: tuple[int, int]
    """(h, w) with h x w = N."""


class Network(nn.Module):
    """Two encoders, their projections and the clustering head, without loading and saving; users create a :class:`ViLSeg`.

    Args:
        config: sizes of the projections and the clustering head, and whether each encoder is ``frozen``.
        image_encoder: module with the interface that ``vilseg.model.image_encoder`` describes.
        text_encoder: text model with its tokenizer.
        segmentation: inference settings that are saved with the model; None takes the defaults.
        temperature: initial value of the learnt temperature of the contrastive loss.
        logit_bias: initial value of the learnt bias of the sigmoid loss; None for a model without this bias.

    Raises:
        ConfigError: the settings request an attention variant that the image encoder does not support.
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
        """Learnt bias of the logits (SigLIP, Zhai et al. 2023, section 3.2), for models trained with one."""
        self.register_buffer("caption_mean", torch.zeros(self.embedding_dim))
        """Mean embedding of the training captions; see ``SegmentationConfig.center_text``."""
        self.register_buffer("patch_mean", torch.zeros(self.embedding_dim))
        self.register_buffer("patch_covariance", torch.eye(self.embedding_dim) / self.embedding_dim)
        """Mean and covariance of the patch embeddings; before training records them, those of uniform random unit vectors."""
        self.register_buffer("recorded_steps", torch.zeros((), dtype=torch.long))
        """Number of training steps whose captions and patches are included in the three statistics above."""
        if config.image_encoder.frozen:
            image_encoder.requires_grad_(False)
        if config.text_encoder.frozen:
            text_encoder.requires_grad_(False)
        self.check_attention()

    def train(self, mode: bool = True) -> Network:
        """Set training mode, or evaluation mode if ``mode`` is False; frozen encoders stay in evaluation mode."""
        super().train(mode)
        if self.config.image_encoder.frozen:
            self.image_encoder.eval()
        if self.config.text_encoder.frozen:
            self.text_encoder.eval()
        return self

    def checkpoint_activations(self) -> None:
        """Enable activation checkpointing of the encoders: blocks keep only their inputs and are recomputed in the backward pass.

        Frozen encoders have no backward pass and are left unchanged.

        Raises:
            ConfigError: an encoder that is not frozen does not support activation checkpointing.
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
        """Device of the weights."""
        return self.logit_scale.device

    @property
    def scale(self) -> Tensor:
        """Inverse temperature of the logits, at most 100; without limit if there is a logit bias, as SigLIP often exceeds 100."""
        if self.logit_bias is not None:
            return self.logit_scale.exp()
        return self.logit_scale.clamp(max=MAX_LOGIT_SCALE).exp()

    def image_features(self, images: Float[Tensor, "B 3 H W"]) -> ImageFeatures:
        """Compute features of the image encoder. Shape: (B, 3, H, W) RGB in 0..1 -> patches (B, N, F)."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.config.image_encoder.frozen):
            return self.image_encoder(images)

    def check_attention(self) -> None:
        """Raise ConfigError if the settings request an attention variant that the image encoder does not support."""
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
        """Compute the features of the image encoder and the patch features to be classified, in one pass.

        Args:
            images: RGB in 0..1. Shape: (B, 3, H, W).
            attention: attention variant of the last block for the patch features to be classified. With ``plain`` they are the
                patches of the features; the other variants need an encoder that passes `check_attention`.

        Returns:
            The features with the plain attention, whose patches are the input of the clustering head, and the patch features to
            be classified (B, N, F).
        """
        if attention == "plain":
            features = self.image_features(images)
            return features, features.patches
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.config.image_encoder.frozen):
            return self.image_encoder.correlated(images, attention)  # type: ignore[operator]  # checked before

    def embed(self, features: ImageFeatures) -> ImageEmbeddings:
        """Project the features of B images into the space shared with texts. Shape: -> (B, D), (B, N, D), unit length."""
        return ImageEmbeddings(self.embed_pooled(features), self.embed_patches(features), features.grid)

    def embed_pooled(self, features: ImageFeatures) -> Float[Tensor, "B D"]:
        """Project the global features of B images into the space shared with texts. Shape: -> (B, D), unit length."""
        pooled_BF = features.patches.mean(1) if features.pooled is None else features.pooled
        return F.normalize(self.image_projection(pooled_BF), dim=-1)

    def embed_patches(self, features: ImageFeatures) -> Float[Tensor, "B N D"]:
        """Project the patch features of B images into the space shared with texts. Shape: -> (B, N, D), unit length."""
        return F.normalize(self.image_projection(features.patches), dim=-1)

    def cluster_logits(self, features: ImageFeatures) -> Float[Tensor, "B N K"]:
        """Compute the cluster logits of every patch of B images. Shape: -> (B, N, K)."""
        return self.clustering_head(features.patches)

    def encode_image(self, images: Float[Tensor, "B 3 H W"]) -> ImageEmbeddings:
        """Compute global and patch embeddings. Shape: (B, 3, H, W) RGB in 0..1 -> (B, D) and (B, N, D), unit length."""
        return self.embed(self.image_features(images))

    def assignments(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B K h w"]:
        """Compute soft cluster assignments of the patches, summing to 1 over K. Shape: (B, 3, H, W) in 0..1 -> (B, K, h, w)."""
        features = self.image_features(images)
        h, w = features.grid
        return self.cluster_logits(features).softmax(-1).transpose(1, 2).unflatten(2, (h, w))

    def text_features(self, tokens: Int[Tensor, "B T"]) -> Float[Tensor, "B F"]:
        """Compute features of the text encoder. Shape: (B, T) token ids -> (B, F)."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.config.text_encoder.frozen):
            return self.text_encoder(tokens)

    def embed_text(self, features_BF: Float[Tensor, "B F"]) -> Float[Tensor, "B D"]:
        """Project text features into the space shared with images. Shape: (B, F) -> (B, D), unit length."""
        return F.normalize(self.text_projection(features_BF), dim=-1)

    def encode_text(self, texts: Sequence[str] | Int[Tensor, "B T"]) -> Float[Tensor, "B D"]:
        """Compute the embeddings of texts or of rows of token ids. Shape: B texts or (B, T) -> (B, D), unit length."""
        tokens = texts if isinstance(texts, Tensor) else self.text_encoder.tokenize(texts)
        return self.embed_text(self.text_features(tokens.to(self.device)))


Model = TypeVar("Model", bound=Network)
"""Type variable: the subclass of `Network` that a function takes as ``cls`` and returns an instance of."""
