"""Terminal output: results on stdout, progress and errors on stderr."""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from jobs.train.monitor import ProgressUpdate

stderr = Console(stderr=True, highlight=False)


def log(text: str) -> None:
    """Print a line of text on stderr."""
    stderr.print(text, markup=False, soft_wrap=True)


class _StderrHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        log(record.getMessage())


@contextmanager
def logging_to_stderr() -> Iterator[None]:
    """Print messages of the logger ``vilseg`` and its children, from level INFO on, to stderr within the ``with`` block.

    Jobs and the library report only through ``logging``, so that they can be used without the command line.
    """
    logger, handler = logging.getLogger("vilseg"), _StderrHandler()
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False  # otherwise a handler of the root logger would print the line again
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


def print_result(value: dict[str, Any], *, as_json: bool, text: str) -> None:
    """Print the result of a command on stdout.

    Args:
        value: result as a dict.
        as_json: print ``value`` as one JSON object on one line instead of ``text``.
        text: result in readable form.
    """
    sys.stdout.write((json.dumps(value, ensure_ascii=False) if as_json else text) + "\n")
    sys.stdout.flush()


_SECONDS_BETWEEN_LINES = 10.0


class _ProgressBar:
    """Base class of progress bars, which are shown within a ``with`` block."""

    _bar: Progress

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()


class CountProgress(_ProgressBar):
    """Progress of countable work: a bar if stderr is a terminal, otherwise a line every ten seconds.

    Args:
        title: name of the work, for example "ingest".
        things: plural name of the counted items, for example "images".
    """

    def __init__(self, title: str, things: str) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        self._bar = Progress(*columns, console=stderr, disable=not stderr.is_terminal)
        self._bar.add_task(title, total=None, note="")
        self._title, self._things = title, things
        self._last_line = -math.inf

    def __call__(self, done: int, total: int, note: str = "") -> None:
        """Show that ``done`` of ``total`` items are done, with an optional note."""
        self._bar.update(self._bar.task_ids[0], completed=done, total=total, note=note)
        now = time.monotonic()
        if not stderr.is_terminal and (now >= self._last_line + _SECONDS_BETWEEN_LINES or done == total):
            self._last_line = now
            log(f"{self._title}: {done:,}/{total:,} {self._things}{note and '  '}{note}")


class SegmentationProgress(_ProgressBar):
    """Progress of a bulk segmentation: a bar if stderr is a terminal, otherwise a line every ten seconds.

    Every rejected input is printed on a line of its own.
    """

    def __init__(self) -> None:
        columns = (BarColumn(bar_width=24), TextColumn("{task.fields[text]}"), TimeElapsedColumn())
        self._bar = Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal)
        self._bar.add_task("segment", total=None, text="starting")
        self._before: tuple[float, int] | None = None
        self._last_line = -math.inf

    def __call__(self, progress: Any) -> None:
        """Show a `jobs.segment.segment_job.Progress`."""
        for name, reason in progress.new_rejected:
            log(f"rejected {name!r}: {reason}")
        now = time.monotonic()
        # The rate is measured from the first finished block on, without the time to start Ray.
        since, count = self._before = self._before or (now, progress.done)
        text = f"{progress.done:,}/{progress.listed:,}{'' if progress.listing_ended else '+'}"
        if progress.done > count:
            rate = (progress.done - count) / (now - since)
            left = (progress.listed - progress.done) / rate if progress.listing_ended else None
            text += f"  {rate:.1f} images/s" + ("" if left is None else f"  {format_duration(left)} left")
        if progress.rejected:
            text += f"  {progress.rejected:,} rejected"
        self._bar.update(
            self._bar.task_ids[0],
            completed=progress.done,
            total=progress.listed if progress.listing_ended else None,
            text=text,
        )
        if not stderr.is_terminal and now >= self._last_line + _SECONDS_BETWEEN_LINES:
            self._last_line = now
            log(f"segmented {text}")


def format_duration(seconds: float) -> str:
    """Format a duration in seconds with a suitable unit.

    Example:
        >>> format_duration(40), format_duration(720), format_duration(12600)
        ('40 s', '12 min', '3.5 h')
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def format_estimate(guess: Any, workers: int) -> str:
    """Format the result of a dry run of ``vilseg segment`` as a sentence.

    Args:
        guess: a `jobs.segment.plan.Estimate`.
        workers: number of CPUs or GPUs.
    """
    text = f"{guess.images:,} inputs, {guess.bytes / 1e6:,.1f} MB"
    if guess.containers:
        text += f", some of them in {guess.containers:,} shards, tables or lists"
    tried = f"{guess.tried} of them took {guess.seconds_per_image * 1000:.0f} ms each"
    if guess.rejected_of_tried:
        tried += f" ({guess.rejected_of_tried} were rejected)"
    return f"{text}; {tried}: about {format_duration(guess.seconds(workers))} on {workers} CPUs. Nothing was written."


_MARKS = {"ok": "[green]ok[/]", "warning": "[yellow]warning[/]", "missing": "[red]missing[/]", "optional": "optional"}


def print_findings(found: Sequence[Any]) -> None:
    """Print the findings of `vilseg doctor` as a table on stdout, followed by the remedies."""
    table = Table(box=None, pad_edge=False, show_header=False)
    for finding in found:
        table.add_row(_MARKS[finding.status], finding.what, escape(finding.found))
    stdout = Console(highlight=False)
    stdout.print(table)
    for finding in found:
        if finding.mend:
            stdout.print(f"{finding.what}: {finding.mend}", markup=False, soft_wrap=True)


@contextmanager
def timed_stage(name: str, seconds: dict[str, float]) -> Iterator[None]:
    """Print the name of a stage at its start, and store its wall time in seconds in ``seconds[name]`` unless it fails."""
    log(f"[{name}]")
    started = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - started


class TrainingProgress(_ProgressBar):
    """Progress of a training: a bar if stderr is a terminal, otherwise a line every ten seconds.

    Args:
        steps: number of steps of the run.
    """

    def __init__(self, steps: int) -> None:
        columns = (BarColumn(bar_width=24), TextColumn("{task.fields[text]}"), TimeElapsedColumn())
        self._bar = Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal)
        self._bar.add_task("train", total=steps, text="starting")
        self._steps = steps
        self._last_line = -math.inf

    def __call__(self, snapshot: ProgressUpdate) -> None:
        """Show the last metrics, and a line for each pair that could not be read."""
        for (key, _), reason in snapshot.bad.items():
            log(f"skipped {key}: {reason}")
        for metrics in snapshot.metrics:
            now, text = time.monotonic(), self._text(metrics)
            self._bar.update(self._bar.task_ids[0], completed=metrics["step"], text=text)
            ended = metrics["step"] == self._steps
            # The last line is printed on a terminal too, because the bar disappears at the end.
            if ended or (not stderr.is_terminal and now >= self._last_line + _SECONDS_BETWEEN_LINES):
                self._last_line = now
                log(text)

    def _text(self, metrics: dict[str, float]) -> str:
        losses = "  ".join(
            f"{name.removeprefix('loss/')} {value:.3f}" for name, value in metrics.items() if name.startswith("loss/")
        )
        left = (self._steps - metrics["step"]) * (metrics["samples"] / metrics["step"]) / metrics["images_per_second"]
        bad = f"  {metrics['bad_pairs']:.0f} bad pairs" if metrics.get("bad_pairs") else ""
        if metrics.get("filtered_pairs"):
            bad += f"  {metrics['filtered_pairs']:.0f} filtered"
        return (
            f"step {metrics['step']:.0f}/{self._steps}  loss {metrics['loss']:.3f}  {losses}  "
            f"{metrics['images_per_second']:.0f} images/s  waiting for data {metrics['data_wait']:.0%}{bad}  "
            f"{format_duration(left)} left"
        )
