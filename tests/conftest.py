"""Shared fixtures; the marker of a test follows from its folder."""

import socket
from collections.abc import Callable
from pathlib import Path

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test by the first folder below tests/: unit, integration or e2e."""
    here = Path(__file__).parent
    for item in items:
        kind = item.path.relative_to(here).parts[0]
        item.add_marker(getattr(pytest.mark, kind))


@pytest.fixture
def no_server(monkeypatch: pytest.MonkeyPatch) -> str:
    """An endpoint where nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{probe.getsockname()[1]}"
    for variable in ("AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "KEY-FOR-TEST")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "SECRET-FOR-TEST")
    return endpoint


@pytest.fixture(scope="session")
def save_tiny_model() -> Callable[[str, int], str]:
    """``save(uri, input_size)`` writes a model of some thousand random weights, always the same, and returns its URI."""

    def save(uri: str, input_size: int) -> str:
        import torch  # tests that need no model should not wait for it

        from vilseg import ViLSeg
        from vilseg.config import ModelConfig, SegmentationConfig

        config = ModelConfig.model_validate(
            {
                "embedding_dim": 16,
                "clusters": 4,
                "image_encoder": {"sizes": {"width": 16, "depth": 1}},
                "text_encoder": {"sizes": {"hidden_size": 16, "num_hidden_layers": 0, "num_attention_heads": 1}},
            }
        )
        # Untrained regions are all alike: patches named by themselves put several classes into a picture.
        settings = SegmentationConfig(input_size=input_size, region_weight=0)
        torch.manual_seed(0)
        made = ViLSeg.from_config(config, ["the sky over the grass", "a boat"], segmentation=settings)
        made.save_pretrained(uri)
        return uri

    return save
