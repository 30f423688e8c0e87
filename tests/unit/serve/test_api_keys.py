"""API keys: generated once, stored as hashes."""

from pathlib import Path

import pytest

from serve import api_keys as module
from serve.api_keys import ApiKeys, add_key
from vilseg.errors import ConfigError, StorageError


def test_a_key_opens_and_the_file_does_not_give_it_away(tmp_path: Path) -> None:
    file = tmp_path / "keys.txt"
    anna, ben = add_key(str(file), "anna"), add_key(str(file), "ben")
    assert anna not in file.read_text()
    keys = ApiKeys(str(file))
    assert (keys.holder(anna), keys.holder(ben)) == ("anna", "ben")
    for wrong in ("", anna[:-1], anna + "x", "anna", file.read_text().split(":")[1][:64]):
        assert keys.holder(wrong) is None


def test_a_line_that_is_deleted_closes_while_the_server_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys.txt"
    anna, ben = add_key(str(file), "anna"), add_key(str(file), "ben")
    keys = ApiKeys(str(file))
    file.write_text("".join(line for line in file.read_text().splitlines(True) if line.startswith("ben")))
    assert not keys.is_stale()
    monkeypatch.setattr(module, "_REFRESH", 0.0)
    assert keys.is_stale()
    keys.refresh()
    assert (keys.holder(anna), keys.holder(ben)) == (None, "ben")


def test_a_file_that_is_gone_leaves_the_keys_as_they_are(tmp_path: Path) -> None:
    file = tmp_path / "keys.txt"
    anna = add_key(str(file), "anna")
    keys = ApiKeys(str(file))
    file.unlink()
    with pytest.raises(ConfigError, match="stay as they were"):
        keys.refresh()
    assert keys.holder(anna) == "anna"


def test_what_is_wrong_is_said(tmp_path: Path) -> None:
    file = tmp_path / "keys.txt"
    with pytest.raises(StorageError, match="does not exist"):
        ApiKeys(str(file))
    add_key(str(file), "anna")
    with pytest.raises(ConfigError, match="'anna' already"):
        add_key(str(file), "anna")
    for name in ("", "a b", "a:b", "../x"):
        with pytest.raises(ConfigError, match="no name for a key"):
            add_key(str(file), name)
    file.write_text("anna=secret\n")
    with pytest.raises(ConfigError, match="line 1 is not NAME:HASH"):
        ApiKeys(str(file))
    file.write_text("# none yet\n")
    with pytest.raises(ConfigError, match="holds no key"):
        ApiKeys(str(file))
