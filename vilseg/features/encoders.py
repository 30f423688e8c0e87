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
    """The encoders whose outputs are cached."""

    images: nn.Module
    texts: TextEncoder | None
    """None where the text encoder is trained, or where its weights are created with the run."""
    settings: ModelConfig
    """Settings of both encoders; with an ``init``, those of the model that it names."""


def load_frozen_encoders(config: RunConfig) -> FrozenEncoders:
    """Load the encoders of the model that a run of this configuration starts from (``vilseg.training.run_setup.prepare``).

    Raises:
        ConfigError: ``config.model`` contradicts the model that the run starts from.
        ModelError: a model cannot be loaded.
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
