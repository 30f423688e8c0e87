"""Requests/s and latency of `vilseg serve`, the bare `Segmenter` and LitServe, with the same model, photos and answers.

Each system has one process that holds the model. Clients send photos in a closed loop: each waits for its answer before it sends
the next photo. The bare loop decodes, segments and makes the same JSON in one process without a server. None of them computes
clusters, which the JSON does not contain. Under overload, requests are sent at four times the best measured rate, without waiting
for answers; the goodput is the rate of requests answered with a mask.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from benchmarks.bulk import CLASSES, save_model
from benchmarks.shared import shared_data
from cli import console

_PHOTOS = 64
_CLIENTS = (1, 8, 32)
_SECONDS = 12.0
_ROUNDS = 2
_OVERLOAD = 4
_ROOT = Path(__file__).parent.parent


def main(out: Path) -> dict[str, Any]:
    """Run the benchmark.

    Args:
        out: folder for the model; replaced if it exists.

    Returns:
        ``ratio`` (requests/s of vilseg at 8 clients over those of the bare loop), ``ratio_litserve`` (over those of LitServe at 8
        clients), ``added_p50_ms`` (median latency of vilseg at 1 client minus that of the bare loop), ``goodput`` (under
        overload, as a fraction of vilseg's best rate), and the results of all rounds.
    """
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    os.environ["OMP_NUM_THREADS"] = "1"
    model = str(out.absolute() / "model")
    save_model(model)
    photos = _photos()
    rounds = []
    for number in range(_ROUNDS):
        found: dict[str, Any] = {"bare": _run("run_bare", model)}
        with _served("vilseg", model) as port:
            found["vilseg"] = {clients: asyncio.run(_closed(port, photos, clients)) for clients in _CLIENTS}
            peak = max(figures["per_second"] for figures in found["vilseg"].values())
            found["overload"] = {"peak": peak, **asyncio.run(_open(port, photos, _OVERLOAD * peak))}
        with _served("litserve", model) as port:
            found["litserve"] = {clients: asyncio.run(_closed(port, photos, clients)) for clients in _CLIENTS}
        rounds.append(found)
        console.log(f"round {number + 1}: {json.dumps(found)}")
    middle = {way: median(found[way][8]["per_second"] for found in rounds) for way in ("vilseg", "litserve")}
    bare = median(found["bare"]["per_second"] for found in rounds)
    return {
        "benchmark": "serve",
        "ratio": round(middle["vilseg"] / bare, 4),
        "ratio_litserve": round(middle["vilseg"] / middle["litserve"], 4),
        "added_p50_ms": round(median(found["vilseg"][1]["p50_ms"] - found["bare"]["p50_ms"] for found in rounds), 1),
        "goodput": round(median(found["overload"]["per_second"] / found["overload"]["peak"] for found in rounds), 4),
        "refused_p99_ms": round(median(found["overload"]["refused_p99_ms"] for found in rounds), 1),
        "rounds": rounds,
        "photos": _PHOTOS,
        "cpus": os.cpu_count(),
    }


def _photos() -> list[bytes]:
    files = sorted((shared_data("flickr8k_full/images") / "flickr8k_full" / "images").glob("*.jpg"))
    return [file.read_bytes() for file in files[:_PHOTOS]]


def _run(function: str, *arguments: str) -> Any:
    code = f"from benchmarks.serve import {function}; {function}(*{arguments!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=_ROOT, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def run_bare(model: str) -> None:
    """Segment photos one after another in this process, and print requests/s and latencies as a JSON object."""
    work = OnePhoto(model)
    photos = _photos()
    for photo in photos[:8]:
        work(photo)
    times, begun = [], time.perf_counter()
    while time.perf_counter() - begun < _SECONDS:
        started = time.perf_counter()
        work(photos[len(times) % len(photos)])
        times.append(time.perf_counter() - started)
    print(json.dumps(_figures(times, time.perf_counter() - begun)))


class OnePhoto:
    """Function from an encoded photo to the JSON answer, which the bare loop and LitServe call."""

    def __init__(self, model: str) -> None:
        import torch

        from vilseg import Segmenter, ViLSeg

        torch.set_num_threads(1)
        self._segmenter = Segmenter(ViLSeg.from_pretrained(model), CLASSES, keep_clusters=False)

    def __call__(self, photo: bytes) -> bytes:
        from serve.encoding import encode
        from serve.request_types import SegmentRequest
        from vilseg.data.image_decoding import decode_image

        request = SegmentRequest(request_id="0", model="default", image=photo, vocabulary=self._segmenter.vocabulary)
        return encode(self._segmenter(decode_image(photo)), request)[0]


@contextmanager
def _served(way: str, model: str) -> Iterator[int]:
    """A server in a process of its own; yields its port once it has answered."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = {
        "vilseg": ["-m", "cli.app", "serve", "--model", f"default={model}", "--port", str(port), "replicas.maximum=1"],
        "litserve": ["-m", "benchmarks.serve_litserve", model, str(port)],
    }[way]
    server = subprocess.Popen(
        [sys.executable, *command], cwd=_ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        asyncio.run(_warm_up(port, server))
        yield port
    finally:
        server.send_signal(signal.SIGINT)
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            server.kill()


async def _warm_up(port: int, server: subprocess.Popen[bytes]) -> None:
    import aiohttp

    photos = _photos()
    async with aiohttp.ClientSession() as session:
        end = time.monotonic() + 120
        while time.monotonic() < end and server.poll() is None:
            try:
                if (await _post(session, port, photos[0]))[0] == 200:
                    for photo in photos[:8]:
                        await _post(session, port, photo)
                    return
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(0.5)
    raise RuntimeError("the server does not answer")


async def _post(session: Any, port: int, photo: bytes) -> tuple[int, float]:
    """Status and seconds."""
    import aiohttp

    form = aiohttp.FormData({"classes": ",".join(CLASSES)})
    form.add_field("image", photo, filename="photo.jpg", content_type="image/jpeg")
    begun = time.perf_counter()
    async with session.post(f"http://127.0.0.1:{port}/v1/segment", data=form) as response:
        body = await response.read()
        assert response.status != 200 or b'"regions"' in body, body[:200]
        return response.status, time.perf_counter() - begun


async def _closed(port: int, photos: list[bytes], clients: int) -> dict[str, float]:
    import aiohttp

    times: list[float] = []
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        begun = time.perf_counter()

        async def client(number: int) -> None:
            while time.perf_counter() - begun < _SECONDS:
                status, seconds = await _post(session, port, photos[(number + len(times)) % len(photos)])
                assert status == 200, status
                times.append(seconds)

        await asyncio.gather(*map(client, range(clients)))
        return _figures(times, time.perf_counter() - begun)


async def _open(port: int, photos: list[bytes], rate: float) -> dict[str, float]:
    import aiohttp

    answers: list[tuple[int, float]] = []
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        begun, tasks = time.perf_counter(), []

        async def send(photo: bytes) -> None:
            answers.append(await _post(session, port, photo))

        while (now := time.perf_counter() - begun) < _SECONDS:
            while len(tasks) < rate * now:
                tasks.append(asyncio.create_task(send(photos[len(tasks) % len(photos)])))
            await asyncio.sleep(0.005)
        sent_for = time.perf_counter() - begun
        within = sum(status == 200 for status, _ in answers)
        await asyncio.gather(*tasks)
    served = [seconds for status, seconds in answers if status == 200]
    refused = [seconds for status, seconds in answers if status == 503]
    assert len(served) + len(refused) == len(answers), {status for status, _ in answers}
    return {
        **_figures(served, sent_for),
        "per_second": round(within / sent_for, 2),
        "sent_per_second": round(len(tasks) / sent_for, 1),
        "refused": len(refused),
        "refused_p50_ms": round(1000 * median(refused or [0]), 1),
        "refused_p99_ms": round(1000 * _percentile(refused or [0, 0], 99), 1),
    }


def _figures(times: list[float], seconds: float) -> dict[str, float]:
    return {
        "per_second": round(len(times) / seconds, 2),
        "p50_ms": round(1000 * median(times), 1),
        "p99_ms": round(1000 * _percentile(times, 99), 1),
    }


def _percentile(times: list[float], percent: int) -> float:
    return quantiles(times, n=100, method="inclusive")[percent - 1]
