"""`vilseg submit`: the job made of a verb, and the files and variables sent with it."""

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import typer

from cli.app import app
from cli.submit import packaging
from cli.submit.packaging import Job, Verb, check, fit, stage, variables
from vilseg.errors import UserError

OTHERS = {"name", "format", "host", "address", "overrides", "time_budget", "protocol"}
"""Texts that verbs take and that name no place and no file."""


_RUN = ["data.source=s3://a/b", "trainer.storage=s3://a/runs"]


def checked(arguments: Sequence[str]) -> Verb:
    return check(typer.main.get_command(app), arguments)


def remote(*arguments: str) -> Job:
    return fit(checked(arguments), here=False)


def sent(job: Job) -> list[str]:
    words = shlex.split(job.entrypoint)
    return words[words.index("--") + 1 :]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's folder, with a configuration and a class list in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "run.yaml").write_text("trainer: {steps: 3}\n")
    (tmp_path / "names.txt").write_text("cat\n")
    (tmp_path / "space.yaml").write_text("parameters: {trainer.seed: {choice: [1, 2]}}\ndataset: folder:val\n")
    (tmp_path / "photos").mkdir()
    return tmp_path


def test_every_text_that_a_verb_takes_is_known_for_a_place_a_file_or_neither() -> None:
    for command in app.registered_commands:
        assert command.callback is not None
        kinds = get_type_hints(command.callback)
        texts = {name for name, kind in kinds.items() if {str, Path} & {kind, *get_args(kind), *inner(kind)}}
        unknown = texts - packaging.FILES - packaging.PLACES - packaging.MODELS - OTHERS
        assert not unknown, f"say in cli/submit/packaging.py what {unknown} of '{command.callback.__name__}' are"


def inner(kind: Any) -> list[Any]:
    return [part for one in get_args(kind) for part in get_args(one)]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["trian"], "did you mean 'train'"),
        (["submit", "--", "train"], "no job"),
        (["store", "up"], "this machine only"),
        (["train", "--config", "nowhere.yaml"], "nowhere.yaml does not exist"),
        (["train", "--config", "own/run.yaml", "trainer.stepps=4"], "trainer.steps"),
        (["segment", "s3://a/b", "--model", "s3://a/m", "--out", "s3://a/o", "--classes", "none.txt"], "none.txt"),
        (["serve", "--model", "s3://a/m", "--keys", "keys.txt"], "keys.txt does not exist"),
        (["serve"], "no model to serve"),
    ],
)
def test_mistakes_are_told_before_anything_is_sent(arguments: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        checked(arguments)


@pytest.mark.parametrize("arguments", [["train"], ["train", "--nope"], ["segment", "a", "--limit", "many"]])
def test_arguments_are_read_by_the_verb_s_own_parser(arguments: list[str]) -> None:
    with pytest.raises(typer.TyperException):
        checked(arguments)


def test_on_this_machine_paths_stay_and_the_job_runs_in_the_user_s_folder(folder: Path) -> None:
    arguments = ["segment", "photos", "--model", "m", "--classes", "names.txt", "--out", "it's out"]
    job = fit(checked(arguments), here=True)
    assert job.files == {}
    assert sent(job) == ["segment", "--address", "auto", *arguments[1:]]
    words = shlex.split(job.entrypoint)
    assert words[words.index("--folder") + 1] == str(folder)
    assert job.command == shlex.join(["vilseg", *arguments])


def test_an_address_of_the_user_s_own_is_kept_and_verbs_without_one_get_none() -> None:
    ingest = ["ingest", "s3://a/b", "s3://a/c", "--address", "ray://other:10001"]
    assert sent(remote(*ingest)) == ingest
    export = ["export", "--model", "s3://a/m", "--out", "s3://a/onnx"]
    assert sent(remote(*export)) == export


def test_named_files_travel(folder: Path) -> None:
    to = ["data.source=s3://a/b", "trainer.storage=s3://a/runs"]
    job = remote("train", "--config=own/run.yaml", *to)
    assert job.files == {"given/0/run.yaml": folder / "own" / "run.yaml"}
    assert sent(job) == ["train", "--address", "auto", "--config=given/0/run.yaml", *to]
    job = remote("evaluate", "--model", "s3://a/m", "--dataset", "folder:s3://a/v", "--classes", "names.txt")
    assert job.files == {"given/0/names.txt": folder / "names.txt"}
    assert remote("evaluate", "--model", "s3://a/m", "--dataset", "folder:s3://a/v", "--classes", "cat").files == {}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["segment", "photos", "--model", "s3://a/m", "--out", "s3://a/o", "--classes", "cat"], "^photos names a path"),
        (["segment", "s3://a/b", "--model", "s3://a/m", "--out", "out", "--classes", "cat"], "^--out out names a path"),
        (["segment", "s3://a/b", "--model", "photos", "--out", "s3://a/o", "--classes", "cat"], "^--model photos"),
        (["evaluate", "--model", "s3://a/m", "--dataset", "folder:val"], "^--dataset folder:val"),
        (["train", "--config", "own/run.yaml", "data.source=s3://a/b"], "^trainer.storage=runs"),
        (["train", "--config", "own/run.yaml", "data.source=pairs", "trainer.storage=s3://a/b"], "^data.source=pairs"),
        (
            [
                "train",
                "--config",
                "own/run.yaml",
                "trainer.storage=s3://a/b",
                "data.mix=[{source: s3://a/b}, {source: c}]",
            ],
            "^data.mix.1.source=c",
        ),
        (["train", "--config", "own/run.yaml", *_RUN, "data.held_out=c"], "^data.held_out=c"),
        (["tune", "--config", "own/run.yaml", "--space", "space.yaml", *_RUN], "^dataset=val"),
        (["serve", "--model", "s3://a/m"], "^videos.storage="),
        (["demo"], "^--out runs/demo"),
        (["key", "anna", "--file", "keys.txt"], "^--file keys.txt"),
    ],
)
def test_paths_that_another_machine_does_not_see_are_refused(arguments: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        remote(*arguments)
    fit(checked(arguments), here=True)


def test_absolute_paths_are_the_cluster_s_and_hub_ids_are_no_paths() -> None:
    job = remote("segment", "/data/photos", "--model", "org/model", "--out", "/data/out", "--classes", "cat", "--json")
    (note,) = job.notes
    assert "/data/photos" in note
    assert "/data/out" in note
    assert "org/model" not in note


def test_credentials_go_along_but_not_what_names_files_here(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("AWS_", "HF_", "VILSEG_"))]:
        monkeypatch.delenv(name)
    for name, value in {
        "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_PROFILE": "mine",
        "HF_TOKEN": "y",
        "RAY_AUTH_TOKEN": "z",
    }.items():
        monkeypatch.setenv(name, value)
    found, notes = variables(here=False)
    assert found == {"AWS_SECRET_ACCESS_KEY": "x", "HF_TOKEN": "y"}
    assert len(notes) == 1
    assert "AWS_PROFILE" in notes[0]
    assert variables(here=True)[0]["AWS_PROFILE"] == "mine"
    for endpoint in ("http://localhost:9000", "http://127.0.0.5:1", "http://[::1]:1"):
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        with pytest.raises(UserError, match="only this machine reaches"):
            variables(here=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://store:9000")
    assert variables(here=False)[0]["AWS_ENDPOINT_URL"] == "http://store:9000"


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_the_code_and_the_named_files_are_all_that_travels(tmp_path: Path, folder: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    stage(target, {"given/0/run.yaml": folder / "own" / "run.yaml"}, code=True, own=None)
    found = names(target)
    assert {
        "vilseg/storage/files.py",
        "cli/app.py",
        "serve/config.yaml",
        "cluster/object_store.py",
        "configs/demo.yaml",
    } <= found
    assert {"vilseg/bulk/gallery.css", "given/0/run.yaml"} <= found
    assert {name.partition("/")[0] for name in found} <= {*packaging.PACKAGES, "configs", "given"}
    assert not [name for name in found if "__pycache__" in name or name.endswith(".pyc")]
    assert sum((target / name).stat().st_size for name in found) < 5_000_000


def test_of_a_folder_of_the_user_s_neither_secrets_nor_what_is_large_travels(tmp_path: Path) -> None:
    own = tmp_path / "mine"
    wanted = {"encoder.py", "lib/words.json", "tokens.py"}
    unwanted = {".env", ".git/config", ".venv/bin/python", "env/pyvenv.cfg", "env/lib/torch.py", "runs/first/model.bin"}
    unwanted |= {"server.pem", "id_rsa", "aws_credentials", "my-secrets.yaml", "ray.token", "store/identities.json"}
    for name in wanted | unwanted | {"__pycache__/encoder.pyc"}:
        (own / name).parent.mkdir(parents=True, exist_ok=True)
        (own / name).write_text("x")
    (own / "dangling").symlink_to("nowhere")
    target = tmp_path / "target"
    target.mkdir()
    stage(target, {}, code=False, own=own)
    assert names(target) == wanted


def test_a_folder_too_large_to_travel_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packaging, "_MOST_BYTES", 1000)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "data.bin").write_bytes(bytes(1001))
    with pytest.raises(UserError, match="data by s3://"):
        stage(tmp_path / "target", {}, code=False, own=tmp_path / "mine")
    with pytest.raises(UserError, match="is no folder"):
        stage(tmp_path / "target", {}, code=False, own=tmp_path / "nowhere")
