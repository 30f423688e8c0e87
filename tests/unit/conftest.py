"""Fixtures of the unit tests."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

# Imported once in a server that the workers are forked from: an interpreter of their own each would import for seconds.
_PRELOAD = ["torch.distributed", "vilseg.training.loop"]


def _work(rank: int, rendezvous: str, work: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    import torch.distributed as dist

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
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)

    def run(work: Callable[..., Any], *arguments: Any) -> list[Any]:
        rendezvous = str(tmp_path / "rendezvous")
        with ProcessPoolExecutor(2, mp_context=context) as pool:
            futures = [pool.submit(_work, rank, rendezvous, work, arguments) for rank in range(2)]
            return [future.result(timeout=120) for future in futures]

    return run
