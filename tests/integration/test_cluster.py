"""The local cluster: several real nodes, started, looked at and ended by the command."""

import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.local_cluster import LocalCluster
from vilseg.errors import ClusterError

ROOT = Path(__file__).parents[2]
_WHERE = """
import json, os, time, ray
ray.init(address="auto", log_to_driver=False)
@ray.remote(num_cpus=1)
def where():
    time.sleep(1)
    return ray.get_runtime_context().get_node_id()
print(json.dumps(sorted(ray.get([where.remote(), where.remote()]))))
"""


def vilseg(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cli.app", "cluster", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def answer(url: str, token: str | None) -> int:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        return opener.open(urllib.request.Request(url, headers=headers), timeout=10).status
    except urllib.error.HTTPError as error:
        return error.code


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Iterator[subprocess.Popen[str]]:
    """A second cluster of one node, started while the first one starts."""
    folder = tmp_path_factory.mktemp("other")
    command = [sys.executable, "-m", "cli.app", "cluster", "up", "--dir", str(folder), "--json"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    yield process
    process.wait(300)
    cluster = LocalCluster.attach(folder)
    assert cluster is not None, "ending one cluster leaves others alone"
    assert cluster.is_alive(0)
    cluster.stop()


def test_life_of_a_cluster(other: subprocess.Popen[str], tmp_path: Path) -> None:
    folder = str(tmp_path / "cluster")
    assert json.loads(vilseg("status", "--dir", folder, "--json").stdout) == {"running": False, "nodes": []}
    begun = vilseg("up", "--nodes", "2", "--cpus", "1", "--dir", folder, "--json")
    try:
        assert begun.returncode == 0, begun.stderr
        told = json.loads(begun.stdout)
        assert [node["resources"]["CPU"] for node in told["nodes"]] == [1, 1]
        token = (tmp_path / "cluster" / "token").read_text()
        assert (tmp_path / "cluster" / "token").stat().st_mode & 0o777 == 0o600
        assert token not in begun.stdout + begun.stderr
        assert told["dashboard"].startswith("http://127.0.0.1:")
        assert answer(told["dashboard"] + "/api/version", token) == 200
        assert answer(told["dashboard"] + "/api/jobs/", None) in (401, 403)
        assert json.loads(other.communicate(timeout=300)[0])["dashboard"] != told["dashboard"]

        variables = {name: told[name] for name in told if name.startswith("RAY_")}
        environment = {**os.environ, **variables}
        ran = subprocess.run(
            [sys.executable, "-c", _WHERE], env=environment, capture_output=True, text=True, timeout=120
        )
        assert ran.returncode == 0, ran.stderr
        assert json.loads(ran.stdout.splitlines()[-1]) == sorted(node["id"] for node in told["nodes"])

        refused = vilseg("up", "--nodes", "3", "--dir", folder)
        assert refused.returncode == 2
        assert "vilseg cluster down" in refused.stderr

        cluster = LocalCluster.attach(Path(folder))
        assert cluster is not None
        assert all(len(cluster.processes(index)) > 3 for index in (0, 1))
    finally:
        ended = vilseg("down", "--dir", folder)
    assert ended.stdout == "stopped\n"
    assert cluster.processes(0) | cluster.processes(1) == set()
    assert LocalCluster.attach(Path(folder)) is None
    assert sorted(path.name for path in Path(folder).iterdir()) == ["cluster.lock", "node-0.log", "node-1.log", "token"]


def test_what_cannot_be_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ClusterError, match="choose another with --dir"):
        LocalCluster.start(tmp_path / "file")
    with pytest.raises(ClusterError, match="at least 1 node"):
        LocalCluster.start(tmp_path / "cluster", nodes=0)
    (tmp_path / "cluster.json").write_text("{")
    with pytest.raises(ClusterError, match=r"cluster\.json is damaged"):
        LocalCluster.attach(tmp_path)


def test_another_process_under_the_old_number_is_left_alone(tmp_path: Path) -> None:
    node = {"pid": os.getpid(), "began": 1, "name": "node-0"}
    (tmp_path / "cluster.json").write_text(json.dumps({"nodes": [node], "hosts": []}))
    assert LocalCluster.attach(tmp_path) is None
