"""Shared fixtures; the marker of a test follows from its folder."""

from __future__ import annotations

import itertools
import multiprocessing
import socket
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

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


def _work(rank: int, rendezvous: str, work: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)  # the parent's pool of threads is not there any more
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    try:
        return work(*arguments)
    finally:
        dist.destroy_process_group()


@pytest.fixture
def start_method() -> str:
    """Start method of the two workers: forks have everything imported, but CUDA's threads do not survive a fork."""
    import torch

    return "spawn" if torch.cuda.is_available() else "fork"


@pytest.fixture
def on_two_workers(tmp_path: Path, start_method: str) -> Callable[..., list[Any]]:
    """``run(work, *arguments)`` calls ``work`` in a gloo group of two processes and returns what both returned.

    ``work`` is a function of a test module; arguments and results travel by pickle (NumPy arrays rather than tensors).
    """
    context = multiprocessing.get_context(start_method)
    calls = itertools.count()

    def run(work: Callable[..., Any], *arguments: Any) -> list[Any]:
        rendezvous = str(tmp_path / f"rendezvous-{next(calls)}")  # what an earlier call left leads to ports of the dead
        with ProcessPoolExecutor(2, mp_context=context) as pool:
            futures = [pool.submit(_work, rank, rendezvous, work, arguments) for rank in range(2)]
            return [future.result(timeout=120) for future in futures]

    return run


CAPTIONS = ["a dog on the grass", "two cats and a sofa", "a man rides a horse by the sea"]


@pytest.fixture
def make_model() -> Callable[..., Any]:
    """``make_model(**parts)`` with parts of ``ModelConfig``: a ViLSeg of some thousand random weights, always the same."""

    def make(**parts: Any) -> Any:
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
        import torch  # tests that need no model should not wait for it

        from vilseg.config import ModelConfig
        from vilseg.model import ViLSeg

        torch.manual_seed(0)
        return ViLSeg.from_config(ModelConfig.model_validate(tree), CAPTIONS).eval()

    return make
