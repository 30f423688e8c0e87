"""Verbs as jobs of a real cluster that wants a token, and what the doctor says of it.

The cluster has no variables of the object store: what a job knows of it came with the job.
"""

import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from cluster.local_cluster import LocalCluster
from cluster.object_store import ObjectStore
from vilseg import storage
from vilseg.data.synthetic import scenes

BIN = Path(sys.executable).parent
ENCODER = """
import torch
from vilseg.model.image_encoder import ImageFeatures

class Blocks(torch.nn.Module):
    num_features, patch_size = 48, 4

    def __init__(self):
        super().__init__()
        self.mix = torch.nn.Linear(48, 48)

    def forward(self, images):
        patches = torch.nn.functional.unfold(images, 4, stride=4).transpose(1, 2)
        return ImageFeatures(self.mix(patches), None, (images.shape[2] // 4, images.shape[3] // 4))

def make():
    return Blocks()
"""
CONFIG = """
data: {canvas: 32}
views: {global_size: 32, local_size: 16}
model:
  image_encoder: {factory: "own_encoder:make"}
  text_encoder: {sizes: {hidden_size: 16, num_hidden_layers: 0, num_attention_heads: 1}, max_tokens: 16}
  embedding_dim: 16
loss: {vision: {weight: 0}, nouns: {min_count: 2}}
trainer: {batch_size: 8, steps: 2, checkpoint_every: 2, log_every: 1, workers: 1}
"""
Said = subprocess.CompletedProcess[str]


@dataclass
class Place:
    """A user's folder, and a cluster and a store that his environment names."""

    folder: Path
    environment: dict[str, str] = field(repr=False)
    secrets: list[str] = field(repr=False)
    running: list[subprocess.Popen[str]] = field(default_factory=list)

    def command(self, *arguments: str) -> list[str]:
        return [str(BIN / "vilseg"), *arguments]

    def run(self, *arguments: str, prefix: tuple[str, ...] = (), **changes: str) -> Said:
        done = subprocess.run(
            [*prefix, *self.command(*arguments)],
            cwd=self.folder,
            env=self.environment | changes,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        self.check(done.stdout + done.stderr)
        return done

    def submit(self, *arguments: str, **changes: str) -> Said:
        return self.run("submit", *arguments, **changes)

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            self.command("submit", *arguments),
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.running.append(process)
        return process

    def check(self, text: str) -> None:
        for secret in self.secrets:
            assert secret not in text, "a secret was told"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, save_tiny_model: Callable[[str, int], str]) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("user")
    (folder / "own_encoder.py").write_text(ENCODER)
    (folder / "run.yaml").write_text(CONFIG)
    (folder / "photos").mkdir()
    lines = []
    for pair in scenes.pairs(24, 0, 32):
        (folder / "photos" / f"{pair.key}.jpg").write_bytes(pair.image)
        lines.append(json.dumps({"path": f"{pair.key}.jpg", "caption": pair.captions[0]}))
    (folder / "photos" / "captions.jsonl").write_text("\n".join(lines))
    scenes.write_masked_dataset(str(folder / "val"), 3, 1, 32)
    save_tiny_model(str(folder / "model"), 32)
    store = ObjectStore.start(tmp_path_factory.mktemp("store"))
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(("AWS_", "RAY_A", "HF_"))]:
            patch.delenv(name)
        patch.setenv("PATH", f"{BIN}:{os.environ['PATH']}")
        cluster = LocalCluster.start(tmp_path_factory.mktemp("cluster"), cpus=4)
        for name, value in store.environment().items():
            patch.setenv(name, value)  # for the tests themselves; the cluster has started without
        environment = {**os.environ, **cluster.environment(), "NO_COLOR": "1"}
        # By value and not by the name of a file, so that the doctor's other way is seen as well.
        environment["RAY_AUTH_TOKEN"] = cluster.token
        del environment["RAY_AUTH_TOKEN_PATH"]
        made = Place(folder, environment, [cluster.token, store.environment()["AWS_SECRET_ACCESS_KEY"]])
        try:
            yield made
        finally:
            for process in made.running:
                process.kill()
            cluster.stop()
            store.stop(timeout=0)


def named(said: str) -> str:
    """The id of the job that `submit` told of."""
    match = re.search(r"^job (\S+) at http", said, re.MULTILINE)
    assert match, said
    return match[1]


def until(process: subprocess.Popen[str], text: str) -> str:
    """Stderr of a process up to and including a line with ``text``."""
    assert process.stderr is not None
    said = ""
    for line in process.stderr:
        said += line
        if text in line:
            return said
    raise AssertionError(said)


def refused(done: Said) -> str:
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    (line,) = [line for line in done.stderr.splitlines() if line]
    assert line.startswith("vilseg: ")
    return line


# ---------------------------------------------------------------------------------------------------------- the verbs


@pytest.mark.slow
def test_ingest_and_train(place: Place) -> None:
    done = place.submit("--", "ingest", "photos/captions.jsonl", "s3://vilseg/pairs", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["pairs"] == 24
    assert "ingest: " in done.stderr, "there is no terminal, so a line shows what is done"
    # The encoder is a module of the user's folder, which a worker has to find as well.
    to = ("data.source=s3://vilseg/pairs", "trainer.storage=s3://vilseg/runs")
    done = place.submit("--", "train", "--config", "run.yaml", "--name", "first", *to)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "s3://vilseg/runs/first/model\n"
    assert "step 2/2" in done.stderr
    assert storage.exists("s3://vilseg/runs/first/model/model.safetensors")


@pytest.mark.slow
def test_tune(place: Place) -> None:
    scenes_uri = "s3://vilseg/tune-pairs"
    assert place.submit("--", "ingest", "photos/captions.jsonl", scenes_uri).returncode == 0
    (place.folder / "space.yaml").write_text("parameters: {optimizer.learning_rate: {choice: [0.003]}}\nsearch: grid\n")
    dataset = f"folder:{place.folder}/val"
    arguments = ("tune", "--config", "run.yaml", "--space", "space.yaml", "--dataset", dataset, "--name", "sweep")
    to = (f"data.source={scenes_uri}", "trainer.storage=s3://vilseg/runs")
    done = place.submit("--", *arguments, "--json", *to)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["point"] == {"optimizer.learning_rate": 0.003}
    assert storage.exists("s3://vilseg/runs/sweep/report.html")


@pytest.mark.slow
def test_segment_to_a_folder_of_the_user_s(place: Place) -> None:
    done = place.submit(
        "--json", "--", "segment", "photos", "--model", "model", "--classes", "a,b", "--out", "it's out"
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["status"], told["exit_code"]) == ("succeeded", 0)
    assert "24 of 24 inputs" in told["result"]
    assert (place.folder / "it's out" / "results.parquet").is_file()


def test_a_key_and_the_exit_code_of_a_mistake(place: Place) -> None:
    done = place.submit("--no-wait", "--id", "a-key", "--", "key", "anna", "--file", "keys.txt")
    assert (done.returncode, done.stdout) == (0, "a-key\n")
    assert "the job's log" in done.stderr
    assert "submit logs a-key" in done.stderr
    done = place.submit("logs", "a-key", "--follow")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("vs_")
    assert (place.folder / "keys.txt").read_text().startswith("anna:")
    assert place.submit("logs", "a-key").stdout == done.stdout
    again = place.submit("--", "key", "anna", "--file", "keys.txt")
    assert again.returncode == 2
    assert "has a key for 'anna' already" in again.stderr
    assert "Traceback" not in again.stderr
    assert "a-key" in refused(place.submit("--id", "a-key", "--", "key", "bert", "--file", "keys.txt"))
    told = json.loads(place.submit("status", named(again.stderr), "--json").stdout)
    assert (told["status"], told["exit_code"]) == ("failed", 2)
    assert "\n" not in told["message"]
    jobs = json.loads(place.submit("list", "--json").stdout)["jobs"]
    assert {"a-key", named(again.stderr)} <= {job["id"] for job in jobs}
    assert json.loads(place.submit("stop", "a-key", "--json").stdout)["status"] == "succeeded", "it had ended"


@pytest.mark.slow
def test_on_another_machine_named_files_come_along(place: Place) -> None:
    elsewhere = ("unshare", "--map-root-user", "--uts", "sh", "-c", 'hostname elsewhere && exec "$@"', "sh")
    if subprocess.run([*elsewhere, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this machine does not let a process have a host name of its own")
    names = [f"class {number}" for number in range(len(scenes.CLASSES))]
    (place.folder / "names.txt").write_text("\n".join(names))
    data = f"folder:{place.folder}/val"
    arguments = ("evaluate", "--model", f"{place.folder}/model", "--dataset", data, "--classes", "names.txt", "--json")
    done = place.run("submit", "--no-credentials", "--", *arguments, prefix=elsewhere)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["per_class"].keys() == set(names)
    assert "taken as paths of the cluster's machines" in done.stderr
    assert "only this machine reaches" in refused(place.run("submit", "--", *arguments, prefix=elsewhere))


@pytest.mark.slow
def test_serve_until_it_is_stopped(place: Place) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = place.start("--", "serve", "--model", "model", "--port", str(port))
    said = until(process, "Ctrl-C stops it")
    name = named(said)
    assert process.stdout is not None
    assert process.stdout.readline() == f"page http://127.0.0.1:{port}\n", "a result, as it comes"
    assert len(httpx.get(f"http://127.0.0.1:{port}/v1/models").json()["models"]) == 1
    # Without a terminal Ctrl-C leaves the job running.
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 130
    assert process.stderr is not None
    assert f"vilseg submit stop {name}" in process.stderr.read()
    assert httpx.get(f"http://127.0.0.1:{port}/v1/models").status_code == 200
    assert json.loads(place.submit("status", name, "--json").stdout)["status"] == "running"

    with Relay(place.environment["RAY_DASHBOARD_ADDRESS"]) as relay:
        code = (
            "import sys, cli.submit.job_server, cli.app; "
            "cli.submit.job_server._PATIENCE_S = 2; sys.exit(cli.app.run(sys.argv[1:]))"
        )
        follower = subprocess.Popen(
            [sys.executable, "-c", code, "submit", "logs", name, "--follow", "--address", relay.address],
            cwd=place.folder,
            env=place.environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        place.running.append(follower)
        until(follower, "Ctrl-C stops it")
        relay.cut()
        _, errors = follower.communicate(timeout=60)
        assert follower.returncode == 1, errors
        assert f"vilseg submit logs {name} --follow" in errors
        relay.listen()

        follower = place.start("logs", name, "--follow", "--address", relay.address)
        assert follower.stdout is not None
        assert follower.stdout.readline() == f"page http://127.0.0.1:{port}\n"
        relay.cut()
        until(follower, "lost the connection")
        relay.listen()
        assert place.submit("stop", name).stdout == f"{name} is stopped\n"
        rest, errors = follower.communicate(timeout=60)
        assert follower.returncode == 130, errors
        assert "page" not in rest, "what was shown is not shown again"
        assert "was stopped" in errors
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{port}/v1/models")


@pytest.mark.slow
def test_ctrl_c_on_a_terminal_asks(place: Place) -> None:
    terminal, inside = pty.openpty()
    process = subprocess.Popen(
        place.command("submit", "--", "serve", "--model", "model", "--port", "18437"),
        cwd=place.folder,
        env=place.environment,
        stdin=inside,
        stdout=inside,
        stderr=inside,
        preexec_fn=lambda: os.login_tty(inside),
    )
    os.close(inside)
    said = ""

    def read() -> bool:
        nonlocal said
        try:
            said += os.read(terminal, 4096).decode(errors="replace")
        except OSError:  # the other side is closed
            return False
        return True

    try:
        for awaited, typed in (
            ("this takes", "\x03"),
            ("leaves it running", "\n"),
            ("following on", "\x03"),
            ("running", "s\n"),
        ):
            seen = len(said)
            while awaited not in said[seen:]:
                assert read(), said
            os.write(terminal, typed.encode())
        while read():
            pass
        assert process.wait(timeout=60) == 130, said
    finally:
        process.kill()
        os.close(terminal)
    place.check(said)
    assert "stopping" in said
    assert said.count("this takes") == 1, "what was shown is not shown again"
    name = named(said.replace("\r", ""))
    assert json.loads(place.submit("status", name, "--json").stdout)["status"] == "stopped"


class Relay:
    """A connection to a server, to be cut."""

    def __init__(self, url: str) -> None:
        self._to = ("127.0.0.1", int(url.rpartition(":")[2]))
        self._open: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._port = self._listener.getsockname()[1]
        self.address = f"http://127.0.0.1:{self._port}"

    def __enter__(self) -> "Relay":
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.cut()

    def listen(self) -> None:
        """Go on after `cut`."""
        self._listener = socket.create_server(("127.0.0.1", self._port))
        self.__enter__()

    def cut(self) -> None:
        """End all connections, and take no more."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for end in self._open:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        self._open.clear()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                near, _ = listener.accept()
            except OSError:
                return
            far = socket.create_connection(self._to)
            self._open += [near, far]
            for one, other in ((near, far), (far, near)):
                threading.Thread(target=self._copy, args=(one, other), daemon=True).start()

    @staticmethod
    def _copy(one: socket.socket, other: socket.socket) -> None:
        with suppress(OSError):
            while data := one.recv(65536):
                other.sendall(data)
            other.shutdown(socket.SHUT_WR)


# ------------------------------------------------------------------------------------------------------- what is wrong


def test_mistakes_are_one_sentence_before_anything_runs(place: Place) -> None:
    before = len(json.loads(place.submit("list", "--json").stdout)["jobs"])
    mistakes = [
        (["--", "train", "--config", "nowhere.yaml"], "nowhere.yaml does not exist"),
        (["--", "train", "--nope"], "--nope"),
        (["--", "store", "up"], "no job"),
        (["--id", "a b", "--", "demo"], "no id"),
        (["--working-dir", "nowhere", "--", "demo"], "nowhere is no folder"),
        (["--address", "ray://127.0.0.1:1", "--", "demo"], "no address of a job server"),
        (["--address", "http://me:word@127.0.0.1:1", "--", "demo"], "RAY_AUTH_TOKEN"),
        (["logs", "never", "--follow"], "there is no job 'never'"),
        (["stop", "../never"], "no id of a job"),
    ]
    for arguments, part in mistakes:
        assert part in refused(place.submit(*arguments))
    for changes, part in (
        ({"RAY_AUTH_TOKEN": "wrong" * 8}, "does not accept the token"),
        ({"RAY_AUTH_MODE": "disabled"}, "wants a token"),
        ({"RAY_API_SERVER_ADDRESS": "http://127.0.0.1:1"}, "no job server answers at http://127.0.0.1:1"),
        ({"RAY_DASHBOARD_ADDRESS": ""}, "which cluster?"),
    ):
        assert part in refused(place.submit("--", "demo", "--quick", **changes))
    assert len(json.loads(place.submit("list", "--json").stdout)["jobs"]) == before


# ---------------------------------------------------------------------------------------------------------- the doctor


def diagnosis(done: Said) -> dict[str, dict[str, str]]:
    return {finding["what"]: finding for finding in json.loads(done.stdout)["found"]}


@pytest.mark.slow
def test_doctor_here_and_as_a_job(place: Place) -> None:
    done = place.run("doctor", "--store", "s3://vilseg/runs", "--json")  # of the cluster that RAY_ADDRESS names
    found = diagnosis(done)
    assert done.returncode == 0, done.stdout
    for what in ("packages", "torch", "Ray", "cluster", "object store", "clock", "store s3://vilseg/runs"):
        assert found[what]["status"] == "ok", found[what]
    assert "4 CPUs" in found["cluster"]["found"]
    jobs = {
        answer: place.submit("--no-wait", *options, "--", "doctor", "--json").stdout.strip()
        for answer, options in (("ok", []), ("optional", ["--no-credentials"]))
    }
    for answer, name in jobs.items():
        done = place.submit("logs", name, "--follow")
        assert done.returncode == 0, done.stderr
        assert diagnosis(done)["object store"]["status"] == answer, "credentials come with the job, or not at all"
        assert diagnosis(done)["cluster"]["status"] == "ok"


def test_doctor_without_a_cluster(place: Place) -> None:
    done = place.run("doctor", "--store", "s3://nowhere/at/all", RAY_ADDRESS="")
    assert done.returncode == 1
    assert "no bucket 'nowhere'" in " ".join(done.stdout.split())
    assert "Traceback" not in done.stderr
    dashboard = place.environment["RAY_DASHBOARD_ADDRESS"]
    done = place.run("doctor", "--address", dashboard, "--json")
    assert (done.returncode, diagnosis(done)["cluster"]["status"]) == (0, "ok"), done.stdout
    done = place.run("doctor", "--address", dashboard, "--json", RAY_AUTH_TOKEN="wrong" * 8)
    assert done.returncode == 1
    assert "does not accept the token" in diagnosis(done)["cluster"]["found"]


def test_doctor_does_not_wait_for_a_cluster_that_says_nothing(place: Place) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        started = time.monotonic()
        done = place.run("doctor", "--address", f"127.0.0.1:{silent.getsockname()[1]}", "--json")
    assert done.returncode == 1
    assert "RAY_AUTH_TOKEN" in diagnosis(done)["cluster"]["mend"]
    assert time.monotonic() < started + 120
