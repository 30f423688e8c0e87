"""Every mistake named in the documentation gets one sentence on stderr and exit code 2, and nothing is left behind."""

import json
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from cli import app
from cluster.object_store import ObjectStore
from serve.api_keys import add_key

Refused = Callable[..., str]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    """Run a verb that must be refused; returns its one sentence."""

    def run(*arguments: str) -> str:
        assert app.run(arguments) == 2
        said = capsys.readouterr()
        assert said.out == ""
        assert "Traceback" not in said.err
        lines = [line for line in said.err.splitlines() if line.startswith("vilseg: ")]
        assert len(lines) == 1, said.err
        return lines[0]

    return run


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Starting Ray takes ten seconds; a mistake is to be told before."""

    def start(*arguments: object, **options: object) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr("ray.init", start)


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"data": {"source": str(tmp_path)}, "trainer": {"storage": str(tmp_path / "runs")}}))
    return str(path)


@pytest.fixture
def pictures(tmp_path: Path) -> str:
    from PIL import Image

    folder = tmp_path / "pictures"
    folder.mkdir()
    Image.new("RGB", (32, 32), "red").save(folder / "a.png")
    return str(folder)


@pytest.fixture
def store(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, object_store: ObjectStore
) -> ObjectStore:
    for name, value in object_store.environment().items():
        monkeypatch.setenv(name, value)
    return object_store


@pytest.fixture(scope="module")
def object_store(tmp_path_factory: pytest.TempPathFactory):
    server = ObjectStore.start(tmp_path_factory.mktemp("store"))
    yield server
    server.stop(timeout=0)


def test_misspelt_key_names_the_nearest(refused: Refused, config: str) -> None:
    assert "trainer.batch_size" in refused("train", "--config", config, "trainer.batchsize=8")


def test_missing_config(refused: Refused) -> None:
    assert "nowhere.yaml" in refused("train", "--config", "nowhere.yaml")


def test_no_pairs_at_the_source(refused: Refused, config: str) -> None:
    assert "no pair shards" in refused("train", "--config", config)


def test_no_workers(refused: Refused, config: str) -> None:
    assert "at least 1" in refused("train", "--config", config, "trainer.workers=0")


def test_more_workers_than_cpus(refused: Refused, config: str, tmp_path: Path) -> None:
    import os

    (tmp_path / "pairs.tar").write_bytes(b"")
    said = refused("train", "--config", config, "trainer.workers=4999")
    assert f"{os.cpu_count()} CPUs" in said


@pytest.mark.parametrize("name", ["first", "42", "2026-11-23", "yes", "null"])
def test_run_that_exists(refused: Refused, config: str, tmp_path: Path, name: str) -> None:
    (tmp_path / "pairs.tar").write_bytes(b"")
    (tmp_path / "runs" / name).mkdir(parents=True)
    (tmp_path / "runs" / name / "config.yaml").write_text("name: one\n")
    assert f"the run {tmp_path}/runs/{name} exists already" in refused("train", "--config", config, "--name", name)


def test_resume_of_nothing(refused: Refused, config: str, tmp_path: Path) -> None:
    (tmp_path / "pairs.tar").write_bytes(b"")
    assert "no run to resume" in refused("train", "--config", config, "--name", "never", "--resume")


@pytest.mark.usefixtures("no_ray")
@pytest.mark.parametrize("verb", ["segment", "evaluate"])
def test_folder_that_is_no_model(refused: Refused, tmp_path: Path, pictures: str, verb: str) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    arguments = {
        "segment": ["segment", pictures, "--model", str(empty), "--classes", "a", "--out", str(tmp_path / "out")],
        "evaluate": ["evaluate", "--model", str(empty), "--dataset", f"folder:{_dataset(tmp_path)}"],
    }
    assert "not a model folder" in refused(*arguments[verb])
    assert not (tmp_path / "out").exists()


def test_empty_class_list(refused: Refused, tmp_path: Path, pictures: str) -> None:
    assert "class list is empty" in refused(
        "segment", pictures, "--model", "m", "--classes", " ", "--out", str(tmp_path / "o")
    )


def test_repeated_class_name(refused: Refused, tmp_path: Path, pictures: str) -> None:
    said = refused("segment", pictures, "--model", "m", "--classes", "cat,dog,cat", "--out", str(tmp_path / "o"))
    assert "'cat' is listed twice" in said


def test_too_many_classes(refused: Refused, tmp_path: Path, pictures: str) -> None:
    names = tmp_path / "names.txt"
    names.write_text("\n".join(f"class {i}" for i in range(65_535)))
    said = refused("segment", pictures, "--model", "m", "--classes", str(names), "--out", str(tmp_path / "o"))
    assert "65,534" in said


@pytest.mark.usefixtures("no_ray")
def test_output_that_exists(refused: Refused, tmp_path: Path, pictures: str) -> None:
    out, model = tmp_path / "out", _model(tmp_path)
    out.mkdir()
    (out / "something").write_text("of the user's")
    said = refused("segment", pictures, "--model", model, "--classes", "a", "--out", str(out))
    assert "--resume" in said
    assert "--overwrite" in said
    assert (out / "something").read_text() == "of the user's"


@pytest.mark.usefixtures("no_ray")
def test_pictures_that_do_not_exist(refused: Refused, tmp_path: Path) -> None:
    place, out = str(tmp_path / "nowhere"), str(tmp_path / "out")
    said = refused("segment", place, "--model", _model(tmp_path), "--classes", "a", "--out", out)
    assert f"{place} does not exist" in said


@pytest.mark.usefixtures("no_ray")
def test_key_that_segment_does_not_take(refused: Refused, tmp_path: Path, pictures: str) -> None:
    out = str(tmp_path / "out")
    said = refused("segment", pictures, "trainer.steps=3", "--model", "m", "--classes", "a", "--out", out)
    assert "'trainer.steps=3' cannot be set here" in said


@pytest.mark.parametrize("option", ["--overwrite", "--resume"])
@pytest.mark.usefixtures("no_ray")
def test_output_that_holds_the_pictures(refused: Refused, tmp_path: Path, pictures: str, option: str) -> None:
    said = refused("segment", pictures, "--model", _model(tmp_path), "--classes", "a", "--out", pictures, option)
    assert "overlap" in said
    assert (Path(pictures) / "a.png").exists()


@pytest.mark.parametrize("name", ["evaluation.json", "report.html"])
def test_evaluation_that_exists(refused: Refused, tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text("of the user's")
    said = refused("evaluate", "--model", "m", "--dataset", f"folder:{_dataset(tmp_path)}", "--out", str(out))
    assert f"{out} holds {name} already" in said
    assert (out / name).read_text() == "of the user's"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.colums.image=photo", "did you mean 'data.columns"),
        ("data.columns.picture=photo", "unknown configuration key 'data.columns.picture'"),
        ("trainer.steps=3", "'trainer.steps=3' cannot be set here; ingest takes data.columns.key=value only"),
    ],
)
def test_keys_that_ingest_does_not_take(refused: Refused, tmp_path: Path, override: str, words: str) -> None:
    assert words in refused("ingest", str(tmp_path), str(tmp_path / "pairs"), override)


def test_keys_are_no_places(refused: Refused, tmp_path: Path) -> None:
    assert "at least one SOURCE and a DEST" in refused("ingest", str(tmp_path), "data.columns.image=photo")


def test_demo_into_a_file(refused: Refused, tmp_path: Path) -> None:
    out = tmp_path / "file"
    out.write_text("of the user's")
    assert f"{out} cannot be the demo's folder" in refused("demo", "--out", str(out))
    assert out.read_text() == "of the user's"


def test_bucket_that_does_not_exist(refused: Refused, config: str, store: ObjectStore) -> None:
    said = refused("train", "--config", config, "data.source=s3://no-such-bucket/pairs")
    assert "no-such-bucket" in said
    assert "has no bucket" in said


def test_wrong_credentials(refused: Refused, config: str, store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    said = refused("train", "--config", config, "data.source=s3://vilseg/pairs")
    assert "credentials" in said.lower() or "AWS_SECRET_ACCESS_KEY" in said


def test_store_that_does_not_run(
    refused: Refused, config: str, store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    said = refused("train", "--config", config, "data.source=s3://vilseg/pairs")
    assert "vilseg store up" in said


def _dataset(tmp_path: Path) -> Path:
    from PIL import Image

    folder = tmp_path / "data"
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(folder / "images" / "a.png")
    Image.new("L", (8, 8)).save(folder / "masks" / "a.png")
    (folder / "classes.txt").write_text("a\nb\n")
    return folder


def _model(tmp_path: Path) -> str:
    from vilseg.config import ModelConfig, SegmentationConfig

    folder = tmp_path / "model"
    folder.mkdir()
    tree = {
        "format": 1,
        "model": ModelConfig().model_dump(mode="json"),
        "segmentation": SegmentationConfig().model_dump(mode="json"),
    }
    (folder / "config.json").write_text(json.dumps({**tree, "image_encoder": None, "text_encoder": {}}))
    return str(folder)


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.1", "vilseg.example"])
def test_a_server_that_others_reach_needs_keys(
    refused: Refused, no_ray: None, tmp_path: Path, save_tiny_model: Callable[[str, int], str], host: str
) -> None:
    model = save_tiny_model(str(tmp_path / "model"), 64)
    said = refused("serve", "--model", model, "--host", host)
    assert "has no API keys" in said
    assert "vilseg key NAME --file keys.txt" in said


def test_what_cannot_be_served(
    refused: Refused, no_ray: None, tmp_path: Path, save_tiny_model: Callable[[str, int], str]
) -> None:
    model = save_tiny_model(str(tmp_path / "birds"), 64)
    assert "give --model URI" in refused("serve")
    assert "there is no model folder at ./nowhere" in refused("serve", "--model", "./nowhere")
    assert "two models are called 'birds'" in refused("serve", "--model", model, "--model", model)
    assert "replicas.maximum" in refused("serve", "--model", model, "replicas.maximun=3")
    assert "keys.txt does not exist" in refused("serve", "--model", model, "--keys", str(tmp_path / "keys.txt"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert f"--port {port}" in refused("serve", "--model", model, "--port", port)


def test_keys_that_cannot_be_made(refused: Refused, tmp_path: Path) -> None:
    file = str(tmp_path / "keys.txt")
    add_key(file, "anna")
    assert "'anna' already" in refused("key", "anna", "--file", file)
    assert "no name for a key" in refused("key", "a b", "--file", file)
