"""Program that runs trainings with the code of one tree, one after another.

``loss_parity`` passes the text of this file to ``python -c``, started in the folder of the tree. The tree may be older than this
file, so only the ``vilseg`` command declared in its pyproject.toml is used.

Each line of stdin is a JSON object ``{"name", "arguments"}`` with arguments of ``vilseg``. For each, one line
``{"name", "exit", "seconds"}`` is written to stdout.
"""

import importlib
import json
import logging
import signal
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path

import ray

_INTERRUPTED = 130
"""Exit code of a verb after Ctrl-C or SIGTERM; the next is not to begin."""


def main() -> None:
    """Run the trainings that stdin lists, until its end."""
    answers, sys.stdout = sys.stdout, sys.stderr
    scripts = tomllib.loads(Path("pyproject.toml").read_text())["project"]["scripts"]
    module, _, function = scripts["vilseg"].partition(":")
    modules = ("vilseg", module)
    start_ray()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # by Ray's own, a verb would end as if of itself
    # All processes of this Ray import from where one does: the folders are those of the driver.
    there = ray.get(ray.remote(num_cpus=0)(files).remote(modules))
    for file in (*files(modules), *there):
        if not Path(file).is_relative_to(Path.cwd()):
            sys.exit(f"{file} is not of the tree {Path.cwd()}")
    command = getattr(importlib.import_module(module), function)
    for line in sys.stdin:
        asked = json.loads(line)
        started = time.perf_counter()
        code = run(command, asked["arguments"])
        done = {"name": asked["name"], "exit": code, "seconds": round(time.perf_counter() - started, 1)}
        if code == _INTERRUPTED:
            sys.exit(code)
        print(json.dumps(done), file=answers, flush=True)
    ray.shutdown()


def start_ray() -> None:
    """Start a local Ray with one CPU, to which `run` connects.

    With one CPU the networks use one thread, so that no sum depends on how it is divided among threads.
    """
    for left in (2, 1, 0):
        try:
            ray.init(
                address="local", num_cpus=1, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False
            )
            return
        except Exception as error:
            # All that Ray says of a machine too busy to bring its node up within 30 s.
            if "timed out during startup" not in str(error) or not left:
                raise
            ray.shutdown()


def files(modules: tuple[str, ...]) -> list[str]:
    """Return the path of the file from which each module is imported."""
    return [str(importlib.import_module(name).__file__) for name in modules]


def run(command: Callable[[], None], arguments: list[str]) -> int:
    """Run ``vilseg`` with ``arguments`` in this process, and return its exit code."""
    sys.argv = ["vilseg", *arguments]
    try:
        command()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


main()
