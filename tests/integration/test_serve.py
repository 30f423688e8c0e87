"""The deployment on Ray Serve: lost replicas, overload, rollouts under load, invalid input."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import schemathesis
import yaml
from hypothesis import HealthCheck, given, settings
from PIL import Image

from cluster.ray_session import Session
from vilseg.client import Client, ServiceError
from vilseg.model import ViLSeg

ROOT = Path(__file__).parents[2]
REPLICA = "ray::ServeReplica:vilseg:models"
PATIENCE = 120.0
ONGOING, QUEUE = 4, 8


def deploy(tree: dict[str, Any]) -> None:
    """Deploy as ``serve deploy`` does, and wait until the application runs."""
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ServeDeploySchema

    _get_global_client().deploy_apps(ServeDeploySchema.model_validate(tree), _blocking=True)


class Server:
    """The deployment of ``serve/config.yaml`` with a small model and small limits."""

    def __init__(self, port: int, tree: dict[str, Any]) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.tree = tree

    def replicas(self) -> set[int]:
        """Return the processes that hold models."""
        found = set()
        for place in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                if place.read_text().startswith(REPLICA):
                    found.add(int(place.parent.name))
            except OSError:
                continue  # it has ended
        return found

    def running(self) -> int:
        """Return the number of replicas that Serve reports as running."""
        from ray import serve

        return int(serve.status().applications["vilseg"].deployments["models"].replica_states.get("RUNNING", 0))

    def metric(self, name: str) -> float:
        """Value of a metric of ``/metrics``."""
        lines = httpx.get(f"{self.url}/metrics").text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, save_tiny_model: Callable[[str, int], str]) -> dict[str, str]:
    """Two models that answer differently: of the second the first class is the last."""
    folder = tmp_path_factory.mktemp("models")
    first = save_tiny_model(str(folder / "first"), 64)
    model = ViLSeg.from_pretrained(first)
    model.image_projection.weight.data.neg_()
    model.image_projection.bias.data.neg_()
    model.save_pretrained(str(folder / "second"))
    return {"first": first, "second": str(folder / "second")}


@pytest.fixture(scope="module")
def server(ray_cluster: Session, models: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    from ray import serve

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    tree = yaml.safe_load((ROOT / "serve" / "config.yaml").read_text())
    [application] = tree["applications"]
    tree["http_options"]["port"] = port
    application["args"] = {
        "models": {"default": models["first"], "second": models["second"]},
        "page": False,
        "limits": {"body_bytes": 8 << 20, "pixels": 4_000_000},
        "replicas": {
            **{"minimum": 1, "maximum": 2, "cpus": 0.5, "ongoing": ONGOING, "queue": QUEUE},
            **{"target_ongoing": 1.5, "upscale_delay": 1, "downscale_delay": 3},
        },
        "videos": {"storage": str(tmp_path_factory.mktemp("videos"))},
    }
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    deploy(tree)
    yield Server(port, tree)
    serve.shutdown()


@pytest.fixture(scope="module")
def photo() -> bytes:
    """60 x 40 px."""
    return encoded(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def heavy() -> bytes:
    """An image that takes a few tenths of a second to encode."""
    return encoded(
        np.kron(np.random.default_rng(0).integers(0, 255, (15, 20, 3)), np.ones((100, 100, 1))).astype(np.uint8)
    )


def encoded(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="JPEG")
    return buffer.getvalue()


def post(url: str, image: bytes, **form: str) -> httpx.Response:
    data = {"classes": "sky,grass,boat", **form}
    return httpx.post(f"{url}/v1/segment", files={"image": ("image", image)}, data=data, timeout=PATIENCE)


def until(true: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end, f"waited {PATIENCE} s for {what}"
        time.sleep(0.2)


class Load:
    """Clients that send requests until the context ends; their responses are in ``answers``."""

    def __init__(self, url: str, image: bytes, clients: int) -> None:
        self.answers: list[httpx.Response | Exception] = []
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(clients)
        self._tasks = [self._pool.submit(self._ask, url, image) for _ in range(clients)]

    def _ask(self, url: str, image: bytes) -> None:
        while not self._stop.is_set():
            try:
                self.answers.append(post(url, image))
            except httpx.HTTPError as error:
                self.answers.append(error)

    def __enter__(self) -> Load:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._pool.shutdown()

    def failed(self) -> list[str]:
        return [
            str(getattr(answer, "text", answer)) for answer in self.answers if getattr(answer, "status_code", 0) != 200
        ]


def test_the_client_gets_what_the_segmenter_finds(server: Server, models: dict[str, str], photo: bytes) -> None:
    from vilseg import Segmenter
    from vilseg.data.image_decoding import decode_image

    with Client(server.url) as client:
        assert client.models() == ["default", "second"]
        for name, uri in (("default", models["first"]), ("second", models["second"])):
            wanted = Segmenter(ViLSeg.from_pretrained(uri), ["sky|clouds", "grass", "boat"], device="cpu")
            found = client.segment(photo, ["sky|clouds", "grass", "boat"], model=name)
            np.testing.assert_array_equal(found.labels, wanted(decode_image(photo)).labels)
        one, bad, other = client.batch([photo, b"no picture", decode_image(photo)], ["sky", "grass"])
        assert isinstance(bad, ServiceError)
        assert bad.code == "not_a_picture"
        assert one.labels.shape == other.labels.shape == (40, 60)
        with pytest.raises(ServiceError, match="no such model"):
            client.segment(photo, ["sky"], model="nobody")


def test_a_video_is_segmented_by_the_client(server: Server, tmp_path: Path) -> None:
    pytest.importorskip("av", reason="needs PyAV (pip install vilseg[video])")
    from vilseg.segmentation.video_io import Frame, read_frames, write_video

    frames = (Frame(i, i / 10, np.full((48, 64, 3), 20 * i, np.uint8)) for i in range(8))
    write_video(str(tmp_path / "video.mp4"), frames)
    with Client(server.url) as client:
        video = client.video(
            tmp_path / "video.mp4", ["sky", "grass"], overlay=tmp_path / "o.mp4", masks=tmp_path / "m.zip"
        )
    assert video.frames == len(list(read_frames(tmp_path / "o.mp4"))) == 8
    assert (tmp_path / "m.zip").stat().st_size > 0


def test_overload_is_told_at_once_and_nobody_hangs(server: Server, photo: bytes, heavy: bytes) -> None:
    post(server.url, heavy)
    with ThreadPoolExecutor(60) as pool:
        answers = list(pool.map(lambda _: post(server.url, heavy), range(60)))
    statuses = [answer.status_code for answer in answers]
    assert set(statuses) == {200, 503}
    # Two replicas at most take in so many, and as many again wait outside.
    assert ONGOING + QUEUE <= statuses.count(200) < 60
    refused = [answer for answer in answers if answer.status_code == 503]
    assert all(int(answer.headers["retry-after"]) >= 1 for answer in refused)
    assert all(answer.json()["error"]["code"] == "overloaded" for answer in refused)
    served = [answer.elapsed for answer in answers if answer.status_code == 200]
    assert sorted(answer.elapsed for answer in refused)[len(refused) // 2] < sorted(served)[len(served) // 2]
    assert post(server.url, photo).status_code == 200


def test_work_for_clients_that_are_gone_is_dropped(server: Server, photo: bytes, heavy: bytes) -> None:
    begun = time.monotonic()
    post(server.url, heavy)
    one = time.monotonic() - begun
    before = server.metric("vilseg_stage_seconds_count")

    async def leave() -> None:
        async with httpx.AsyncClient(timeout=PATIENCE) as client:
            form = {"classes": "sky,grass,boat"}
            asks = [
                asyncio.create_task(client.post(f"{server.url}/v1/segment", files={"image": heavy}, data=form))
                for _ in range(ONGOING + QUEUE)
            ]
            await asyncio.sleep(one / 2)
            for ask in asks:
                ask.cancel()
            await asyncio.gather(*asks, return_exceptions=True)

    asyncio.run(leave())
    until(lambda: server.metric("vilseg_pictures_in_work") == 0, "what the clients left behind")
    assert post(server.url, photo).status_code == 200
    answered = (server.metric("vilseg_stage_seconds_count") - before) / 4  # four stages a picture
    assert answered - 1 <= ONGOING, "what waited outside was never begun"


def test_a_replica_that_is_killed_under_load_costs_no_request(server: Server, heavy: bytes) -> None:
    with Load(server.url, heavy, 4) as load:
        until(lambda: len(load.answers) >= 4, "answers")
        retries = server.metric("vilseg_retries_total")
        for replica in server.replicas():
            os.kill(replica, signal.SIGKILL)
        count = len(load.answers)
        until(lambda: len(load.answers) >= count + 12, "answers after the kill")
    assert load.failed() == []
    assert server.metric("vilseg_retries_total") > retries, "what was in flight was asked again"


def test_a_model_is_rolled_out_under_load_without_a_failure(
    server: Server, models: dict[str, str], photo: bytes
) -> None:
    [application] = server.tree["applications"]
    labels = {name: post(server.url, photo, model=name).json()["regions"] for name in ("default", "second")}
    assert labels["default"] != labels["second"]

    def roll_out(uri: str) -> None:
        wanted = {"models": {"default": uri, "second": models["second"]}}
        application["deployments"] = [{"name": "ingress", "user_config": wanted}]
        deploy(server.tree)

    with Load(server.url, photo, 4) as load:
        until(lambda: len(load.answers) >= 4, "answers")
        roll_out(models["second"])
        until(lambda: post(server.url, photo).json()["regions"] == labels["second"], "the new model")
        roll_out("/no/such/model")
        time.sleep(3)
        assert post(server.url, photo).json()["regions"] == labels["second"], "what cannot be loaded changes nothing"
        roll_out(models["first"])
        until(lambda: post(server.url, photo).json()["regions"] == labels["default"], "the old model again")
    assert load.failed() == []


def test_replicas_follow_the_load(server: Server, heavy: bytes) -> None:
    until(lambda: server.running() == 1, "one replica")
    with Load(server.url, heavy, 8) as load:
        until(lambda: server.running() == 2, "a second replica under load")
    assert all(getattr(answer, "status_code", 0) in (200, 503) for answer in load.answers)
    until(lambda: server.running() == 1, "one replica after the load")


def test_every_dirty_file_gets_an_answer_and_no_replica_dies_of_it(server: Server, tmp_path: Path) -> None:
    data = Path(os.environ.get("VILSEG_SHARED_DATA", "../shared/data")).absolute()
    maker, photos = data / "dirty" / "make_dirty.py", data / "flickr8k_full" / "images"
    if not (maker.exists() and photos.exists()):
        pytest.skip(f"{maker} and {photos} are not there; VILSEG_SHARED_DATA names the folder above them")
    subprocess.run([sys.executable, str(maker), str(photos), str(tmp_path)], check=True, capture_output=True)
    until(lambda: len(server.replicas()) == 1, "the replicas of an earlier load to be gone")
    before = server.replicas()
    for line in map(json.loads, (tmp_path / "manifest.jsonl").read_text().splitlines()):
        answer = post(server.url, (tmp_path / line["file"]).read_bytes())
        if answer.status_code == 200:
            assert answer.json()["regions"], line
        else:
            assert 400 <= answer.status_code < 500, (line, answer.text)
            message = answer.json()["error"]["message"]
            assert message[0].isupper(), message
            assert message.endswith("."), message
            assert str(tmp_path) not in message
        if line["kind"] != "corrupt_tolerated" and line["expect"] == "reject":
            assert answer.status_code in (413, 422), line
    assert before <= server.replicas()


@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode))
def test_whatever_the_schema_allows_and_what_it_does_not(server: Server, mode: schemathesis.GenerationMode) -> None:
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    # What the schema allows may still be no picture, and 503 is an answer.
    excluded = [schemathesis.checks.CHECKS.get_one(name) for name in ("not_a_server_error", "positive_data_acceptance")]
    # A form knows only text: what was drawn as a number or as null arrives as a string, and is one.
    as_text = schemathesis.checks.CHECKS.get_one("negative_data_rejection")
    answered: Counter[int] = Counter()

    def try_out(operation: Any) -> None:
        @given(case=operation.as_strategy(generation_mode=mode))
        @settings(
            max_examples=20, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
        )
        def ask(case: schemathesis.Case) -> None:
            response = case.call(timeout=PATIENCE)
            answered[response.status_code] += 1
            assert response.status_code < 500 or response.status_code == 503, response.text
            if response.status_code >= 400 and case.path.startswith("/v1/"):
                assert response.json()["error"]["message"]
            is_form = case.media_type == "multipart/form-data"
            case.validate_response(response, excluded_checks=[*excluded, as_text] if is_form else excluded)

        ask()

    operations = [operation.ok() for operation in schema.get_all_operations()]
    assert len(operations) == 9
    for operation in operations:
        takes_something = operation.body or operation.path_parameters
        if takes_something or mode is schemathesis.GenerationMode.POSITIVE:
            try_out(operation)
    assert sum(answered.values()) > 50


def test_what_is_in_flight_when_the_application_is_taken_down_is_answered(server: Server, heavy: bytes) -> None:
    """Must be the last test: it deletes the application."""
    from ray import serve

    with ThreadPoolExecutor(3) as pool:
        asks = [pool.submit(post, server.url, heavy) for _ in range(3)]
        until(lambda: any(ask.done() for ask in asks), "the first answer")
        serve.delete("vilseg")
        assert [ask.result().status_code for ask in asks] == [200] * 3
