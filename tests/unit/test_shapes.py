"""Shapes of public tensor functions are checked while the unit tests run."""

import sys
from collections.abc import Callable
from typing import Any

import jaxtyping
import pytest
import torch

BEFORE = "vilseg.model.vilseg" in sys.modules


@pytest.mark.skipif(BEFORE, reason="integration tests of the same run imported the model first, so it is not checked")
def test_a_wrong_shape_is_refused(make_model: Callable[..., Any]) -> None:
    model = make_model()
    assert model.embed_text(torch.zeros(3, 16)).shape == (3, 8)
    with pytest.raises(jaxtyping.TypeCheckError, match="features_BF"):
        model.embed_text(torch.zeros(3, 4, 16))
    with pytest.raises(jaxtyping.TypeCheckError, match="images"):
        model.encode_image(torch.zeros(2, 32, 32, 3))
    with pytest.raises(jaxtyping.TypeCheckError, match="images"):
        model.encode_image(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))
