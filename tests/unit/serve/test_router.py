"""Requests whose replica is lost: retried, and blamed on the image only if the cluster works without it."""

from __future__ import annotations

import asyncio
from typing import Any

from serve.http_errors import HttpError
from serve.metrics import Metrics
from serve.request_types import SegmentRequest, SegmentResponse
from serve.router import Router
from tests.unit.serve.fake_replicas import FakeReplicas
from vilseg.text.vocabulary import Vocabulary

FATAL = b"an image that ends its process"


def segment(handle: Any, *images: bytes) -> list[SegmentResponse | BaseException]:
    """Results of concurrent requests."""
    router = Router(handle, {"m": "/m"}, Metrics())
    requests = [
        SegmentRequest(request_id=str(number), model="m", image=image, vocabulary=Vocabulary(("sky",)))
        for number, image in enumerate(images)
    ]

    async def run() -> list[SegmentResponse | BaseException]:
        return await asyncio.gather(*map(router.segment, requests), return_exceptions=True)

    return asyncio.run(asyncio.wait_for(run(), 20))


def is_fatal(call: Any) -> bool:
    return isinstance(call, SegmentRequest) and call.image == FATAL


def test_an_image_that_ends_every_process_is_refused_and_others_with_it_are_answered() -> None:
    handle = FakeReplicas(is_fatal)
    first, fatal, last = segment(handle, b"an image", FATAL, b"another image")
    assert isinstance(fatal, HttpError)
    assert (fatal.status, fatal.code) == (422, "fatal_picture")
    assert handle.generation == 3
    for response in (first, last):
        assert isinstance(response, SegmentResponse)
        assert response.body == b"done"


def test_replicas_that_end_whatever_they_do_are_not_blamed_on_the_image() -> None:
    [error] = segment(FakeReplicas(lambda _: True), b"an image")
    assert isinstance(error, HttpError)
    assert (error.status, error.code) == (503, "unavailable")
    assert error.retry_after is not None


def test_a_process_that_is_unreachable_for_a_while_is_not_blamed_on_the_image() -> None:
    [error] = segment(FakeReplicas(is_fatal, is_new_process=False), FATAL)
    assert isinstance(error, HttpError)
    assert error.status == 503


def test_a_request_whose_replica_is_lost_is_sent_again() -> None:
    lost: list[Any] = []
    [response] = segment(FakeReplicas(lambda call: not lost and not lost.append(call)), b"an image")
    assert isinstance(response, SegmentResponse)
    assert lost
