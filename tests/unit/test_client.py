"""The client of the HTTP API against answers of any kind."""

from __future__ import annotations

import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import httpx
import numpy as np
import pytest

from vilseg import client as module
from vilseg.api_schema import ImageResult, ModelInfo, Models
from vilseg.client import Client, ServiceError, seconds_until_retry
from vilseg.segmentation.result import Segmentation

MODELS = Models(models=[ModelInfo(name="night", default=False), ModelInfo(name="day", default=True)]).to_json()


def client(*responses: httpx.Response) -> Client:
    """A client of a server that gives these answers in turn."""
    left = list(responses)
    return Client("http://server", transport=httpx.MockTransport(lambda _: left.pop(0)))


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    made: list[float] = []
    monkeypatch.setattr(time, "sleep", made.append)
    return made


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (None, 1),
        ("", 1),
        ("soon", 1),
        ("nan", 1),
        ("0", 0),
        ("7", 7),
        ("-5", 0),
        ("inf", 60),
        ("99999999999", 60),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0),
        ("Wed, 21 Oct 2015 07:28:00 -0000", 0),
        ("Fri, 31 Dec 9999 23:59:59 GMT", 60),
        ("Wed, 99 Oct 2015 07:28:00 GMT", 1),
    ],
)
def test_a_server_names_the_wait_in_any_form(header: str | None, seconds: float) -> None:
    assert seconds_until_retry(header) == seconds


def test_a_busy_server_is_asked_again_at_the_date_it_names(waits: list[float]) -> None:
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=20), usegmt=True)
    busy = httpx.Response(503, headers={"Retry-After": date})
    with client(busy, httpx.Response(200, content=MODELS)) as asked:
        assert asked.models() == ["day", "night"]
    assert len(waits) == 1
    assert 5 < waits[0] <= 10, "the first wait is half of what the server names"


def test_answers_that_are_not_of_vilseg_are_an_error_of_one_sentence(waits: list[float]) -> None:
    page = b"<html>please log in</html>"
    for response in (httpx.Response(200, content=page), httpx.Response(502, content=page)):
        with client(response) as asked, pytest.raises(ServiceError) as error:
            asked.models()
        assert error.value.code == "unknown"
        assert error.value.status == response.status_code
        assert "\n" not in str(error.value)


def test_the_client_decodes_what_the_server_encodes() -> None:
    labels = np.array([[0, 0, 255, 1], [0, 0, 1, 1]], np.uint8)
    sent = Segmentation(labels=labels, classes=("sky", "sea"), scores=np.full((2, 4), 0.5, np.float32))
    body = ImageResult.from_segmentation(sent, request_id="1", model="day", with_polygons=True).to_json()
    with client(httpx.Response(200, content=body)) as asked:
        found = asked.segment(np.zeros((2, 4, 3), np.uint8), ["sky", "sea"])
    np.testing.assert_array_equal(found.labels, labels)
    assert found.classes == ("sky", "sea")
    np.testing.assert_array_equal(found.scores, np.where(labels == 255, 0, 0.5))


def test_the_client_starts_without_torch_and_without_the_server() -> None:
    code = f"import sys, {module.__name__}; print([name for name in ('torch', 'serve', 'ray') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
