"""Processes that outlive the command that starts them."""

import os
import signal
import sys
from pathlib import Path

import pytest

from cluster.daemon import process_start, send_signal, session_processes, start_daemon, wait_until


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux")
def test_a_daemon_and_its_children_are_found_and_ended(tmp_path: Path) -> None:
    code = "import subprocess; print('up', flush=True); subprocess.run(['sleep', '60'])"
    log = tmp_path / "log"
    log.write_text("before\n")
    process = start_daemon([sys.executable, "-c", code], tmp_path, os.environ, log, append=True)
    start = process_start(process.pid)
    assert start is not None
    try:
        assert wait_until(lambda: len(session_processes(process.pid, start)) == 2, 60)
        assert os.getsid(process.pid) == process.pid != os.getsid(0)
        assert session_processes(process.pid, start + 1) == set(), "another process under the old number"
        assert log.read_text() == "before\nup\n"
    finally:
        send_signal(session_processes(process.pid, start), signal.SIGKILL)
        process.wait(60)
    assert wait_until(lambda: session_processes(process.pid, start) == set(), 60)
    assert process_start(process.pid) is None
    assert wait_until(lambda: False, 0) is False
