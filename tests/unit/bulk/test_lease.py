"""One job at a time writes to an output."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vilseg.bulk import lease as module
from vilseg.bulk.lease import LOCK, lease
from vilseg.errors import StorageError


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SETTLE_S", 0.05)


def held_by(folder: Path, **change: object) -> None:
    with lease(str(folder)):
        tree = json.loads((folder / LOCK).read_text())
    (folder / LOCK).write_text(json.dumps({**tree, **change}))


def test_second_job_is_told_who_holds_it(tmp_path: Path) -> None:
    with (
        lease(str(tmp_path)),
        pytest.raises(StorageError, match=r"another job .*writes to .*expires at"),
        lease(str(tmp_path)),
    ):
        pass
    assert not (tmp_path / LOCK).exists()


def test_another_machine_is_waited_for_until_the_lock_expires(tmp_path: Path) -> None:
    held_by(tmp_path, host="elsewhere")
    with pytest.raises(StorageError, match="on elsewhere"), lease(str(tmp_path)):
        pass
    held_by(tmp_path / "other", host="elsewhere", expires=time.time() - 1)
    with lease(str(tmp_path / "other")):
        pass


def test_a_process_that_died_here_is_not_waited_for(tmp_path: Path) -> None:
    code = f"from vilseg.bulk.lease import lease\nimport os, signal\nwith lease({str(tmp_path)!r}):\n"
    code += "    os.kill(os.getpid(), signal.SIGKILL)"
    subprocess.run([sys.executable, "-c", code], check=False)
    assert (tmp_path / LOCK).exists()
    with lease(str(tmp_path)):
        pass


def test_the_lock_is_pushed_on_while_its_holder_lives(tmp_path: Path) -> None:
    with lease(str(tmp_path), expiry=10, renew=0.05) as held:
        first = json.loads((tmp_path / LOCK).read_text())["expires"]
        time.sleep(0.3)
        assert json.loads((tmp_path / LOCK).read_text())["expires"] > first
        held.check()


def test_a_holder_that_was_taken_over_is_told_and_leaves_the_lock_alone(tmp_path: Path) -> None:
    with lease(str(tmp_path), renew=0.05) as held:
        tree = json.loads((tmp_path / LOCK).read_text())
        (tmp_path / LOCK).write_text(json.dumps({**tree, "token": "another", "host": "elsewhere"}))
        time.sleep(0.3)
        with pytest.raises(StorageError, match="on elsewhere"):
            held.check()
    assert json.loads((tmp_path / LOCK).read_text())["token"] == "another"


def test_two_at_the_same_moment_do_not_both_hold_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def meanwhile(_: float) -> None:
        tree = json.loads((tmp_path / LOCK).read_text())
        (tmp_path / LOCK).write_text(json.dumps({**tree, "token": "another"}))

    monkeypatch.setattr(module.time, "sleep", meanwhile)
    with pytest.raises(StorageError, match="at the same moment"), lease(str(tmp_path)):
        pass


def test_a_foreign_lock_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text("of the user's")
    with pytest.raises(StorageError, match="not a lock of vilseg"), lease(str(tmp_path)):
        pass
    assert (tmp_path / LOCK).read_text() == "of the user's"
