"""The web application in this process, with a tiny model and no Ray behind it."""

from __future__ import annotations

import asyncio
import io
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from serve.config import ServeConfig

Start = Callable[..., Any]


@pytest.fixture(scope="session")
def model_uri(tmp_path_factory: pytest.TempPathFactory, save_tiny_model: Callable[[str, int], str]) -> str:
    return save_tiny_model(str(tmp_path_factory.mktemp("model")), 64)


@pytest.fixture(scope="session")
def photo() -> bytes:
    """A JPEG of 60 x 40 px with two halves."""
    pixels = np.random.default_rng(0).integers(0, 60, (40, 60, 3), dtype=np.uint8)
    pixels[:, 30:] += 150
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="JPEG", quality=95)
    return buffer.getvalue()


@pytest.fixture
def start(model_uri: str, tmp_path: Path) -> Iterator[Start]:
    """``start(**config)``: a client of the application; ``segment`` replaces the model."""
    from fastapi.testclient import TestClient

    from serve.api_keys import ApiKeys
    from serve.engine import Engine, LoadedModel
    from serve.fastapi_app import make_app
    from serve.http_errors import HttpError
    from serve.metrics import Metrics
    from serve.video_jobs import segment_video_job
    from serve.video_uploads import VideoUploads

    clients: list[Any] = []

    def make(
        segment: Any = None, address: str = "127.0.0.1", host: str = "localhost", root_path: str = "", **parts: Any
    ) -> Any:
        tree = {
            "models": {"default": model_uri, "other": model_uri},
            "videos": {"storage": str(tmp_path / "videos")},
            "page": False,
        }
        config = ServeConfig.model_validate({**tree, **parts})
        engine = Engine(batch=config.replicas.batch, max_pixels=config.limits.pixels)
        model = LoadedModel(model_uri)

        async def segment_here(request: Any) -> Any:
            found = await engine.segment(model, request)
            if found.status != 200:
                raise HttpError(found.status, found.code, found.message)
            return found

        async def segment_video(job: Any) -> None:
            await asyncio.to_thread(
                segment_video_job, job, lambda: model.segmenter(job.vocabulary), config.limits, threading.Event()
            )

        app = make_app(
            config=lambda: config,
            keys=ApiKeys(config.keys) if config.keys else None,
            metrics=Metrics(),
            segment=segment or segment_here,
            uploads=VideoUploads(config, segment_video),
        )
        client = TestClient(app, base_url=f"http://{host}", client=(address, 50000), root_path=root_path)
        client.__enter__()
        clients.append(client)
        return client

    yield make
    for client in clients:
        client.__exit__(None, None, None)
