"""Fixtures of the unit tests."""

from __future__ import annotations

import itertools
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest


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
def on_two_workers(tmp_path: Path) -> Callable[..., list[Any]]:
    """``run(work, *arguments)`` calls ``work`` in a gloo group of two processes and returns what both returned.

    ``work`` is a function of a test module; arguments and results travel by pickle (NumPy arrays rather than tensors).
    """
    import torch

    # Forks have everything imported, which takes longer than all they do; but CUDA's threads do not survive a fork.
    context = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "fork")

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
