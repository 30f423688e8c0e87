"""cluster/Dockerfile, as far as it goes without Docker: its own linter, and whether what it copies is there."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml

from tests.integration.cluster import commands
from tests.integration.cluster.conftest import KUBERNETES, program

ROOT = KUBERNETES.parents[1]
DOCKERFILE = ROOT / "cluster" / "Dockerfile"


def instructions() -> list[tuple[str, str]]:
    """Every instruction with its arguments on one line."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in joined.splitlines() if line)]


def arguments(name: str) -> list[str]:
    return [rest for instruction, rest in instructions() if instruction == name]


def is_let_in(path: str) -> bool:
    """Return whether .dockerignore keeps a file of the repository in the build context: the last matching pattern decides."""
    let_in = True
    above = [str(parent) for parent in Path(path).parents][:-1]
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        pattern = line.removeprefix("!")
        plain = pattern.removeprefix("**/")
        found = [Path(part).name if plain != pattern else part for part in (path, *above)]
        # An asterisk does not pass a slash.
        if any(fnmatch(part, plain) and part.count("/") == plain.count("/") for part in found):
            let_in = line.startswith("!")
    return let_in


@pytest.fixture(scope="session")
def context(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the build is sent."""
    folder = tmp_path_factory.mktemp("context")
    tracked = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    files = subprocess.run(tracked, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, files.split("\0")):
        if is_let_in(name) and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    return folder


def lint(text: str) -> list[str]:
    done = subprocess.run(
        [program("hadolint"), "--no-color", "-"], input=text, capture_output=True, text=True, timeout=60
    )
    return done.stdout.splitlines()


def test_the_linter_finds_nothing() -> None:
    assert lint(DOCKERFILE.read_text()) == []


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("USER 1000:1000", "USER root", "DL3002"),
        ("python:3.11.14-slim-bookworm AS", "python AS", "DL3006"),
        ("--yes --no-install-recommends", "--yes", "DL3015"),
        ("WORKDIR /home/ray", "WORKDIR home", "DL3000"),
        ("ENV PATH", "ENVI PATH", "missing whitespace"),
    ],
)
def test_the_linter_finds_what_is_wrong(old: str, new: str, said: str) -> None:
    text = DOCKERFILE.read_text()
    assert old in text
    assert said in "\n".join(lint(text.replace(old, new)))


def test_it_has_two_stages_on_the_python_that_the_lock_is_for() -> None:
    first, last = arguments("FROM")
    assert first == f"{last} AS build"
    (minor,) = re.findall(r"--python-version (\S+)", (ROOT / "Makefile").read_text())
    assert re.fullmatch(rf"python:{re.escape(minor)}\.\d+-slim-\w+", last)


def test_it_does_not_run_as_root_and_as_whom_kubernetes_expects() -> None:
    cluster = yaml.safe_load((KUBERNETES / "base" / "raycluster.yaml").read_text())["spec"]
    context = cluster["headGroupSpec"]["template"]["spec"]["securityContext"]
    assert arguments("USER") == [f"{context['runAsUser']}:{context['runAsGroup']}"]
    assert f"--uid {context['runAsUser']} " in arguments("RUN")[-1]


def test_every_package_is_of_the_lock() -> None:
    installs = [part for line in arguments("RUN") for part in line.split("&&") if "uv pip install" in part]
    assert len(installs) == 2
    for install in installs:
        assert "constraint requirements.lock" in install
    extras = set(re.findall(r"--extra (\S+)", installs[0]))
    assert extras <= set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])


def test_what_is_copied_is_there(context: Path) -> None:
    for line in arguments("COPY"):
        if not line.startswith("--from="):
            *sources, _ = line.split()
            for source in sources:
                assert (context / source).exists(), source


def test_nothing_is_sent_that_the_image_does_not_need(context: Path) -> None:
    packages = {name.split(".")[0] for name in project_packages()}
    allowed = {"LICENSE", "README.md", "pyproject.toml", "requirements.lock", "configs", *packages}
    assert {part.name for part in context.iterdir()} == allowed
    for name in (
        ".env",
        ".git/config",
        "runs/demo/model/model.safetensors",
        "store/key",
        "keys.txt",
        "serve/__pycache__/a.pyc",
    ):
        assert not is_let_in(name), name


def project_packages() -> list[str]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]


def test_the_package_can_be_built_of_what_is_sent(context: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        tmp_path,
    ]
    subprocess.run([*command, shutil.copytree(context, tmp_path / "src")], check=True, timeout=120)
    (wheel,) = tmp_path.glob("vilseg-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        built = set(archive.namelist())
    for name in project_packages():
        folder = ROOT / name.replace(".", "/")
        for file in folder.iterdir():
            if file.suffix in (".py", ".css", ".js", ".html"):
                assert str(file.relative_to(ROOT)) in built


def test_the_health_check_is_a_verb_and_so_is_the_command() -> None:
    (check,) = arguments("HEALTHCHECK")
    words = yaml.safe_load(check.partition(" CMD ")[2])
    assert words == ["vilseg", "doctor"]
    if "doctor" in commands.verbs():
        assert commands.parse(" ".join(words))[0] == "doctor"


def test_it_has_what_kubernetes_and_ray_up_call() -> None:
    """wget by KubeRay's probes; rsync and ssh by Ray on the head, which starts the other machines."""
    (install,) = [line for line in arguments("RUN") if "apt-get install" in line]
    for package in ("wget", "rsync", "openssh-client", "libexpat1"):
        assert f" {package} " in install
