"""The frozen encoders that a feature cache is written with."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from vilseg.config import ModelConfig, RunConfig
from vilseg.model import ViLSeg
from vilseg.model.image_encoder import build_image_encoder
from vilseg.model.text_encoder import TextEncoder, build_text_encoder
from vilseg.training.run_setup import model_settings


class FrozenEncoders(NamedTuple):
    """Frozen encoders whose outputs are cached."""

    images: nn.Module
    texts: TextEncoder | None
    """None if the text encoder is trained, or if it starts with random weights because it has no checkpoint."""
    settings: ModelConfig
    """Settings of both encoders; if ``model.init`` is set, those of the model at that path or URI."""


def load_frozen_encoders(config: RunConfig) -> FrozenEncoders:
    """Load the frozen encoders of the model that a training run with this configuration starts from.

    ``vilseg.training.run_setup.prepare`` builds the same model for training.

    Raises:
        ConfigError: ``config.model`` contradicts the model that the run starts from.
        ModelError: ``model.init`` or an encoder checkpoint cannot be loaded.
    """
    torch.manual_seed(config.trainer.seed)
    model = model_settings(config)
    frozen_texts = model.text_encoder.frozen
    if model.init:
        start = ViLSeg.from_config(model).eval()
        return FrozenEncoders(start.image_encoder, start.text_encoder if frozen_texts else None, start.config)
    images = build_image_encoder(model.image_encoder).eval()
    loaded = frozen_texts and model.text_encoder.checkpoint
    return FrozenEncoders(images, build_text_encoder(model.text_encoder).eval() if loaded else None, model)
