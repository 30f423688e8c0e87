"""Lines of progress on stderr."""

import logging

import pytest

from cli import app, console


def test_what_jobs_log_is_printed_on_stderr_once_and_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("vilseg.jobs.train")
    with console.logging_to_stderr():
        logger.info("features of %d of 2 shards [cached]", 1)
        logger.debug("left out")
    logger.info("after the verb")
    shown = capsys.readouterr()
    assert shown.err == "features of 1 of 2 shards [cached]\n"
    assert shown.out == ""


def test_every_verb_prints_what_is_logged(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        app, "app", lambda *_, **__: logging.getLogger("vilseg.jobs.train").info("training by 2 workers")
    )
    assert app.run(["train"]) == 0
    assert capsys.readouterr().err == "training by 2 workers\n"
