"""``vilseg export`` from an object store to an object store, its weights in files of their own."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from cli.app import run
from vilseg import storage


@pytest.mark.usefixtures("object_store")
def test_an_export_lies_on_the_store_whole(
    save_tiny_model: Callable[[str, int], str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("vilseg.export.onnx_file._LARGEST_FILE", 0)
    out = "s3://vilseg/export/onnx"
    call = ["export", "--model", save_tiny_model("s3://vilseg/export/model", 32), "--out", out]
    assert run([*call, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["uri"] == out
    assert result["difference"] < 1e-4
    names = {entry.relative for entry in storage.list_files(out)}
    towers = {"image.onnx", "image.onnx.data", "text.onnx", "text.onnx.data"}
    assert {*towers, "export.json", "statistics.npz", "tokenizer/tokenizer.json"} <= names
    assert json.loads(storage.read_text(f"{out}/export.json"))["model"] == "s3://vilseg/export/model"

    assert run(call) == 2
    assert "holds an export already" in capsys.readouterr().err
    storage.write_text(f"{out}/notes.txt", "mine")
    assert run([*call, "--overwrite"]) == 2
    assert f"{out} holds notes.txt, which no export wrote" in capsys.readouterr().err


@pytest.mark.usefixtures("object_store")
def test_an_export_on_the_store_is_replaced_as_a_whole(tmp_path: Path) -> None:
    from vilseg.export.output_directory import output_folder

    out = "s3://vilseg/export/replaced"
    storage.write_text(f"{out}/text.onnx.data", "of before")
    with output_folder(out) as folder:
        (folder / "image.onnx").write_text("new")
        (folder / "export.json").write_text("{}")
    assert [entry.relative for entry in storage.list_files(out)] == ["export.json", "image.onnx"]
