"""Run every code block of README.md and docs/, as written, on small data at the places that the blocks name.

Commands that take minutes (a training, a sweep, a cluster, a job) are checked against the command line and the configuration, and
run in ``make slow``. Commands of other programs (kubectl, ray) are checked by these programs where that needs no cluster.
"""

import csv
import json
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from markdown_it import MarkdownIt
from PIL import Image

from cli import app as command_line
from cluster.object_store import ObjectStore
from cluster.ray_session import Session
from serve.api_keys import add_key
from tests.integration.cluster.commands import parse
from tests.integration.cluster.conftest import program
from tests.unit import benchmark_dataset_trees, checkpoints
from vilseg import storage
from vilseg.config import RunConfig
from vilseg.data.shards import write_index, write_tar
from vilseg.data.synthetic import scenes

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
HUB_ID = "openai/clip-vit-large-patch14"
SMALL = {
    "train": "trainer.workers=1 trainer.steps=2 trainer.batch_size=8 trainer.checkpoint_every=2 trainer.log_every=1",
    "tune": "--trials 2 trainer.steps=2 trainer.batch_size=8 trainer.checkpoint_every=2",
}
"""Arguments that make a run short; the last of the same name counts."""
LONG = {"demo", "train", "tune", "serve", "submit", "cluster"}
"""Verbs that take a minute, or start processes of their own."""


@dataclass(frozen=True)
class Block:
    """A fenced code block.

    Args:
        document: file name.
        line: of the opening fence, from 1.
        language: after the fence.
        text: between the fences.
    """

    document: str
    line: int
    language: str
    text: str

    def commands(self) -> list[list[str]]:
        """Words of each command of a shell block, without redirections; ``eval "$(…)"`` and ``&&`` give the commands in them."""
        joined = self.text.replace("\\\n", " ")
        found = []
        for line in joined.splitlines():
            for command in re.split(r"\s&&\s", re.sub(r'^eval "\$\((.*)\)"', r"\1", line.strip())):
                words = shlex.split(re.sub(r"\s>\s\S+", "", command), comments=True)
                if words:
                    found.append(words)
        return found

    def __str__(self) -> str:
        return f"{self.document}:{self.line}"


def _blocks() -> list[Block]:
    return [
        Block(path.name, token.map[0] + 1, token.info.strip(), token.content)
        for path in DOCUMENTS
        for token in MarkdownIt().parse(path.read_text())
        if token.type == "fence" and token.map
    ]


BLOCKS = _blocks()


def of(language: str) -> list[Block]:
    return [block for block in BLOCKS if block.language == language]


def is_long(block: Block) -> bool:
    return any(words[0] == "vilseg" and (words[1] in LONG or HUB_ID in words) for words in block.commands())


def cases(blocks: list[Block], *, long: bool) -> list[Any]:
    """Parameters for the shell blocks that are long, or for the others."""
    return [
        pytest.param(block, id=str(block), marks=[pytest.mark.slow] if long else [])
        for block in blocks
        if is_long(block) == long
    ]


def test_every_block_has_a_language_that_is_run() -> None:
    assert {block.language for block in BLOCKS} <= {"python", "sh", "yaml"}
    assert len(BLOCKS) > 30


# --------------------------------------------------------------------------------------------------- where the blocks run


@pytest.fixture(scope="module")
def home(
    tmp_path_factory: pytest.TempPathFactory, object_store: ObjectStore, save_tiny_model: Callable[[str, int], str]
) -> Path:
    """The folder that the documentation's commands are typed in, and the bucket that they name."""
    home = tmp_path_factory.mktemp("home")
    for name in ("configs", "serve", "cluster", "Makefile", "requirements.lock", "pyproject.toml", "tests"):
        (home / name).symlink_to(ROOT / name)
    pairs = list(scenes.pairs(40, 1, 64))
    for folder in ("photos", "images"):
        (home / folder).mkdir()
        for pair in pairs[:4]:
            (home / folder / f"{pair.key}.jpg").write_bytes(pair.image)
    (home / "photo.jpg").write_bytes(pairs[0].image)
    with (home / "photos" / "captions.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("image", "caption"), *((f"{p.key}.jpg", p.captions[0]) for p in pairs[:4])])
    (home / "classes.txt").write_text("sky\ngrass\ntree\n")
    (home / "s3.env").write_text("AWS_ACCESS_KEY_ID=a\nAWS_SECRET_ACCESS_KEY=b\n")
    (home / "rooms.yaml").write_text(next(block.text for block in of("yaml") if "settee" in block.text))
    (home / "run.yaml").write_text((ROOT / "configs" / "demo.yaml").read_text())
    add_key(str(home / "keys.txt"), "seed")
    _write_video(home / "video.mp4")
    _write_geotiff(home / "scene.tif")
    scenes.write_masked_dataset(str(home / "data" / "val"), 3, 5, 64)
    _write_rooms(home / "data" / "rooms")
    benchmark_dataset_trees.voc(home / "data" / "VOCdevkit" / "VOC2012")
    for run in ("first", "demo"):
        save_tiny_model(str(home / "runs" / run / "model"), 64)
    checkpoints.contrastive("clip", home / "models" / "clip-vit-base-patch16")
    _as_hub_cache(home)
    _fill_bucket(home, pairs)
    return home


def _write_video(path: Path) -> None:
    from vilseg.segmentation.video_io import Frame, write_video

    frames = [np.full((64, 64, 3), 20 * number, np.uint8) for number in range(4)]
    write_video(str(path), (Frame(number, number / 4, frame) for number, frame in enumerate(frames)))


def _write_rooms(root: Path) -> None:
    """A dataset with masks of the classes of rooms.yaml."""
    random = np.random.default_rng(2)
    for folder, shape in (("images", (64, 64, 3)), ("masks", (64, 64))):
        (root / folder).mkdir(parents=True)
        highest = 3 if folder == "masks" else 256
        Image.fromarray(random.integers(0, highest, shape, np.uint8)).save(root / folder / "a.png")
    (root / "classes.txt").write_text("cat\nsofa\nbackground\n")


def _write_geotiff(path: Path) -> None:
    import rasterio
    from rasterio.transform import from_origin

    profile = {"driver": "GTiff", "width": 64, "height": 64, "count": 3, "dtype": "uint8", "crs": "EPSG:32633"}
    with rasterio.open(path, "w", transform=from_origin(4e5, 5e6, 10, 10), **profile) as file:
        file.write(np.random.default_rng(0).integers(0, 256, (3, 64, 64), np.uint8))


def _as_hub_cache(home: Path) -> None:
    """Lay a tiny CLIP checkpoint out as the hub's client keeps what it downloaded."""
    folder = home / "hub" / f"models--{HUB_ID.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    (folder / "snapshots").mkdir()
    (folder / "snapshots" / ("0" * 40)).symlink_to(home / "models" / "clip-vit-base-patch16")


def _fill_bucket(home: Path, pairs: list[scenes.ScenePair]) -> None:
    import boto3

    boto3.client("s3").create_bucket(Bucket="bucket")
    members = [(pair.key, pair.image, "jpg", {"captions": list(pair.captions)}) for pair in pairs]
    for uri in ("s3://bucket/pairs", "s3://vilseg/demo/pairs"):
        half = len(members) // 2
        counts = [write_tar(f"{uri}/{n:05d}.tar", iter(members[n * half : (n + 1) * half])) for n in range(2)]
        write_index(uri, [(f"{n:05d}.tar", count) for n, count in enumerate(counts)])
    for local, uri in (("images", "photos"), ("runs/first/model", "runs/first/model")):
        storage.upload_folder(home / local, f"s3://bucket/{uri}")
    scenes.write_masked_dataset("s3://vilseg/demo/unseen", 3, 5, 64)


@pytest.fixture
def here(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """``home`` as working folder, with the hub's cache in it and no network."""
    monkeypatch.chdir(home)
    monkeypatch.setenv("HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return home


@pytest.fixture(scope="module")
def server(home: Path) -> Iterator[str]:
    """The URL of ``vilseg serve`` with the model of the documentation."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "cli.app", "serve", "--model", str(home / "runs" / "first" / "model"), "--json"]
    process = subprocess.Popen(
        [*command, "--port", str(port), "replicas.maximum=1"], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout
    yield str(json.loads(process.stdout.readline())["url"])
    process.send_signal(signal.SIGINT)
    assert process.wait(90) == 0


# ------------------------------------------------------------------------------------------------------------ the blocks


@pytest.mark.parametrize("block", of("python"), ids=str)
def test_python_blocks_run(block: Block, here: Path, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    text = block.text
    if "vilseg.Client" in text:
        text = text.replace("http://127.0.0.1:8000", request.getfixturevalue("server"))
    if "onnxruntime" in text:
        arguments = ["export", "--model", str(here / "runs" / "first" / "model"), "--out", str(here / "onnx")]
        assert command_line.run(arguments) == 0
    exec(compile(text, str(block), "exec"), {})


@pytest.mark.parametrize("block", of("yaml"), ids=str)
def test_yaml_blocks_are_read_by_what_they_are_for(block: Block, here: Path, tmp_path: Path) -> None:
    tree = yaml.safe_load(block.text)
    path = tmp_path / "block.yaml"
    path.write_text(block.text)
    if "parameters" in tree:
        from tune.search_space import SearchSpace

        SearchSpace.load(str(path)).check(RunConfig.load("configs/demo.yaml", []))
    elif "classes" in tree:
        from vilseg.text.vocabulary import Vocabulary

        assert "sofa" in Vocabulary.parse(str(path)).classes
    elif "deployments" in tree:
        from ray.serve.schema import DeploymentSchema

        names = {part["name"] for part in yaml.safe_load((ROOT / "serve" / "config.yaml").read_text())["applications"]}
        assert names
        assert [DeploymentSchema.model_validate(part).name for part in tree["deployments"]] == ["ingress"]
    elif "resources" in tree:  # rendered by kubectl and held against the rules in cluster/test_kubernetes.py
        assert (ROOT / "cluster" / "kubernetes" / "gpu" / "train" / "kustomization.yaml").is_file()
    else:
        RunConfig.load(str(path), [])


def filled(words: list[str]) -> list[str]:
    """A command with what "…" stands for."""
    words = [word.replace("s3://…", "s3://bucket/pairs") for word in words]
    if words[:3] == ["vilseg", "segment", "…"]:
        return [
            "vilseg",
            "segment",
            *shlex.split("photos --model runs/first/model --classes cat,sofa --out masks"),
            *words[3:],
        ]
    return [("runs/first/model" if word == "…" else word) for word in words]


@pytest.mark.parametrize("block", [pytest.param(block, id=str(block)) for block in of("sh")])
def test_commands_are_accepted(block: Block, here: Path) -> None:
    for words in map(filled, block.commands()):
        _accept(words)


def _accept(words: list[str]) -> None:
    name, *rest = words
    if name == "vilseg":
        _accept_verb(rest)
    elif name == "make":
        subprocess.run(["make", "--dry-run", *rest], check=True, capture_output=True, cwd=ROOT)
    elif name == "kubectl" and rest[0] in ("apply", "delete"):
        place = rest[rest.index("-k") + 1]
        subprocess.run([program("kubectl"), "kustomize", str(ROOT / place)], check=True, capture_output=True)
    elif name == "kubectl" and rest[:2] == ["create", "secret"]:
        command = [program("kubectl"), *rest, "--dry-run=client", "-o", "name"]
        subprocess.run(command, check=True, capture_output=True)
    elif name in ("ray", "serve"):
        _accept_click(name, rest)
    elif name == "docker" and rest[0] == "build":
        assert (ROOT / rest[rest.index("-f") + 1]).is_file()
    else:  # of other programs, those that read or change a cluster that is not here
        assert name in ("curl", "docker", "kubectl", "helm", "git", "cd", ".", "export", "base64", "python"), words


def _accept_verb(arguments: list[str]) -> None:
    if arguments[0] == "submit" and "--" in arguments:
        return _accept_verb(arguments[arguments.index("--") + 1 :])
    if arguments[0] in ("store", "cluster", "submit"):
        code = command_line.run([*arguments[:2], "--help"])
        assert code == 0
        return None
    verb, parameters = parse(shlex.join(["vilseg", *arguments]))
    if verb in ("train", "tune") and not str(parameters["config"]).startswith("s3://"):
        config = str(parameters["config"])
        known = config if Path(config).is_file() else "configs/demo.yaml"  # the reader's own file
        RunConfig.load(known, parameters.get("overrides") or [])
    return None


def _accept_click(name: str, arguments: list[str]) -> None:
    if name == "ray":
        from ray.scripts.scripts import cli as group
    else:
        from ray.serve.scripts import cli as group
    verb, command, rest = group.resolve_command(group.make_context(name, list(arguments)), list(arguments))
    command.make_context(verb, [str(ROOT / word) if (ROOT / word).is_file() else word for word in rest])


def _run(words: list[str], server: Callable[[], str]) -> str:
    """Run a command and return what it printed on stdout."""
    name, *rest = words
    if name == "curl":
        rest = [word.replace("http://127.0.0.1:8000", server()) for word in rest]
        return subprocess.run(["curl", "--fail", "-s", *rest], check=True, capture_output=True).stdout.decode("latin-1")
    if name != "vilseg":
        return ""
    with redirect_stdout(StringIO()) as printed:
        assert command_line.run(rest) == 0, words
    return printed.getvalue()


@pytest.mark.parametrize("block", cases(of("sh"), long=False))
def test_short_commands_run(
    block: Block, here: Path, ray_cluster: Session, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    for words in map(filled, block.commands()):
        out = _run(_elsewhere(words), lambda: request.getfixturevalue("server"))
        for variable, value in re.findall(r"^export (\w+)=(.*)$", out, re.MULTILINE):
            monkeypatch.setenv(variable, value)


def _elsewhere(words: list[str]) -> list[str]:
    """The command with results that no other block has written."""
    if words[:2] in (["vilseg", "segment"], ["vilseg", "evaluate"], ["vilseg", "export"], ["vilseg", "ingest"]):
        return [*words, "--overwrite"]
    return words


@pytest.mark.parametrize("block", cases(of("sh"), long=True))
def test_long_commands_run(
    block: Block, here: Path, object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Each command in a process of its own, in its own working folder, trainings and sweeps cut short."""
    for path in here.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)
    try:
        for words in map(filled, block.commands()):
            _run_process(words, monkeypatch)
    finally:
        for verb in ("cluster", "store"):
            if any(words[:3] == ["vilseg", verb, "up"] for words in block.commands()):
                subprocess.run([sys.executable, "-m", "cli.app", verb, "down"], check=True)


def _run_process(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    name, *rest = words
    if name != "vilseg":
        return
    verb = next((word for word in rest[rest.index("--") + 1 :] if "--" in rest), rest[0]) if "--" in rest else rest[0]
    rest = [*(rest if verb != "demo" else [*rest, "--quick"]), *shlex.split(SMALL.get(verb, ""))]
    process = subprocess.Popen([sys.executable, "-m", "cli.app", *rest], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    if verb == "serve":
        assert process.stdout.readline().startswith("http")
        process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=500)
    assert process.returncode == 0, words
    for variable, value in re.findall(r"^export (\w+)=(.*)$", printed, re.MULTILINE):
        monkeypatch.setenv(variable, value)
