"""A model small enough to be made in every test."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from vilseg.config import ModelConfig
from vilseg.model import ViLSeg

CAPTIONS = ["a dog on the grass", "two cats and a sofa", "a man rides a horse by the sea"]


@pytest.fixture
def make_model() -> Callable[..., ViLSeg]:
    """``make_model(**parts)``: a ViLSeg of some thousand random weights, always the same ones; parts of ``ModelConfig`` by name."""

    def make(**parts: Any) -> ViLSeg:
        tree = {
            "image_encoder": {"sizes": {"width": 16, "depth": 1}},
            "text_encoder": {
                "sizes": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32},
                "max_tokens": 12,
            },
            "embedding_dim": 8,
            "clusters": 5,
            **parts,
        }
        torch.manual_seed(0)
        return ViLSeg.from_config(ModelConfig.model_validate(tree), CAPTIONS).eval()

    return make
