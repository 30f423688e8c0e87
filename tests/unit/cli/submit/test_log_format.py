"""Results and other output of a job are told apart in the single log that Ray keeps."""

import io
import json
import sys

import pytest

from cli.submit.log_format import RESULT, MarkedLines


def marked(*texts: str) -> str:
    log = io.StringIO()
    stream = MarkedLines(log)
    for text in texts:
        stream.write(text)
    return log.getvalue()


def test_every_line_of_a_result_is_marked_once() -> None:
    assert marked("one\ntw", "o\n", "\n", "three") == f"{RESULT}one\n{RESULT}two\n{RESULT}\n{RESULT}three"
    odd = json.dumps({"name": "a\u2028b\x0bc\x85"}, ensure_ascii=False)
    assert marked(odd + "\n") == f"{RESULT}{odd}\n"


def test_print_writes_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    log = io.StringIO()
    monkeypatch.setattr(sys, "stdout", MarkedLines(log))
    print("a", 1)
    print("b", end="")
    assert log.getvalue() == f"{RESULT}a 1\n{RESULT}b"


def test_it_passes_for_the_stream_that_it_stands_for() -> None:
    stream = MarkedLines(io.TextIOWrapper(io.BytesIO(), encoding="utf-8"))
    assert (stream.encoding, stream.isatty()) == ("utf-8", False)
    stream.flush()
