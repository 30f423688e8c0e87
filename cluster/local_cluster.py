"""Local Ray cluster of several nodes on this machine, to try a cluster without several machines.

It is for one user on one machine. All its files are in one folder:

    token             secret, made once; it allows to run any code on the nodes (mode 0600)
    cluster.json      nodes, addresses and resources of the running or last cluster
    node-0.log …      output of each node's command; node 0 is the head
    ray               symbolic link to Ray's own files, including its logs; `stop` deletes them

A node is a `ray start --block` with its own raylet, object store and workers, as on a separate machine. The dashboard with the
job server listens only on the loopback address. Ray's other ports are open to the network, but they reject requests without the
token (except for metrics of the nodes' load). Only the processes in the session of a node's command, and their descendants, count
as the node's, so that no other process is ever ended.
"""

from __future__ import annotations

import json
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from cluster.daemon import process_start, send_signal, session_processes, start_daemon
from cluster.private_files import exclusive_lock, write_private
from vilseg.errors import ClusterError

LOOPBACK = "127.0.0.1"
START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 10.0
_TRIES = 5
"""Number of attempts to start a node. An attempt may fail because another program takes a port before Ray opens it, or because
the node's agents do not start within Ray's limit of 15 s on a busy machine."""
_LAST_LINES = 30
"""Number of lines of each of Ray's logs that are kept after a failed start."""
_PORTS = range(20_000, 32_000)
"""Range of ports to choose from; below the range from which systems assign ports to outgoing connections."""
_STORE_FRACTION, _STORE_LEAST, _STORE_MOST = 0.1, 100 << 20, 1 << 30
"""Fraction of the machine's memory for the object stores of all nodes together; minimum and maximum bytes per node."""


@dataclass(frozen=True)
class Host:
    """Host of a node.

    Attributes are the address on which the node listens, and the prefix of its command that runs it there, for example
    ``ip netns exec NAME``.
    """

    address: str = LOOPBACK
    prefix: tuple[str, ...] = ()


@dataclass(frozen=True)
class Node:
    """Process of a node's command."""

    pid: int
    began: int
    """Start time in clock ticks since boot (proc(5)), to distinguish the process from a later one with the same id."""
    name: str
    """Name of the node in Ray. It is new at every start, because Ray lists a dead node for a while."""


class LocalCluster:
    """Running local cluster; use `start` or `attach` to create an instance."""

    def __init__(self, directory: Path, state: dict[str, Any]):
        self.directory = directory
        self._state = state
        self._commands: list[subprocess.Popen] = []  # commands started by this process, which has to reap them

    @classmethod
    def start(
        cls, directory: Path, nodes: int = 1, cpus: int | None = None, hosts: Sequence[Host] = ()
    ) -> LocalCluster:
        """Start the cluster of ``directory`` and wait until all nodes have joined it.

        The nodes outlive the process that started them. If the cluster is running, only nodes that have died are started again.

        Args:
            directory: folder for token, state and logs.
            nodes: number of nodes, including the head.
            cpus: number of CPUs that each node reports to Ray. If None, the machine's CPUs are divided among the nodes.
            hosts: host of each node; if empty, all nodes listen on the loopback address.

        Raises:
            ClusterError: the cluster cannot start, or one with other numbers of nodes or CPUs runs in ``directory``.
        """
        directory = directory.expanduser().resolve()
        if not Path("/proc/self/stat").exists():
            raise ClusterError("a local cluster needs Linux; elsewhere a verb without --address starts one node")
        if nodes < 1 or (cpus is not None and cpus < 1):
            raise ClusterError(f"a cluster has at least 1 node with 1 CPU each, not {nodes} with {cpus}")
        with _exclusive(directory):
            running = cls.attach(directory)
            if running is not None and not running.is_alive(0):
                running._end()  # without the head node the other nodes are useless
            elif running is not None:
                if len(running._state["nodes"]) != nodes or cpus not in (None, running._state["cpus"]):
                    raise ClusterError(
                        f"the cluster in {directory} has {len(running._state['nodes'])} nodes with "
                        f"{running._state['cpus']} CPUs each: stop it with `vilseg cluster down` before it can change"
                    )
                running._start_missing()
                return running
            if not (directory / "token").exists():
                write_private(directory / "token", secrets.token_hex(32))
            for left in range(_TRIES - 1, -1, -1):
                cluster = cls(directory, _new_state(nodes, cpus, hosts))
                try:
                    cluster._start_head()
                    cluster._start_missing()
                    break
                except BaseException as error:  # also on Ctrl-C, since the processes would keep running unnoticed
                    cluster._end()
                    if not left or not isinstance(error, ClusterError):
                        raise
            return cluster

    @classmethod
    def attach(cls, directory: Path) -> LocalCluster | None:
        """Return the cluster of ``directory`` if any of its processes runs, else None.

        Raises:
            ClusterError: ``cluster.json`` is damaged.
        """
        directory = directory.expanduser().resolve()
        path = directory / "cluster.json"
        try:
            state = json.loads(path.read_text())
            cluster = cls(directory, state | {"nodes": [node and Node(**node) for node in state["nodes"]]})
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (ValueError, LookupError, TypeError) as error:
            raise ClusterError(f"{path} is damaged: remove it, and end the processes of Ray that still run") from error
        return cluster if any(cluster.processes(index) for index in range(cluster.size)) else None

    @property
    def address(self) -> str:
        """Address of the head node, for ``--address`` and ``RAY_ADDRESS``."""
        return f"{self._host(0).address}:{self._state['ports']['head']}"

    @property
    def dashboard(self) -> str:
        """URL of the dashboard and of the job server."""
        return f"http://{LOOPBACK}:{self._state['ports']['dashboard']}"

    @property
    def token(self) -> str:
        """Secret token that Ray requires with every request."""
        return (self.directory / "token").read_text().strip()

    @property
    def size(self) -> int:
        """Number of nodes, including those that have died."""
        return len(self._state["nodes"])

    def environment(self) -> dict[str, str]:
        """Return the environment variables with which Ray, its commands and `vilseg --address auto` connect to this cluster."""
        return {
            "RAY_ADDRESS": self.address,
            "RAY_DASHBOARD_ADDRESS": self.dashboard,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.directory / "token"),
        }

    def nodes(self) -> list[dict[str, Any]]:
        """Return a description of every node, head first.

        Returns:
            For each node a dict of its ``index``, ``alive``, ``pid``, ``id`` (Ray's node id) and ``resources``.
        """
        known = {entry["node_name"]: entry for entry in self._ray_nodes() if entry["state"] == "ALIVE"}
        found = []
        for index, node in enumerate(self._state["nodes"]):
            entry = known.get(node.name, {}) if node else {}
            resources = {
                key: value for key, value in entry.get("resources_total", {}).items() if not key.startswith("node:")
            }
            alive = self.is_alive(index) and bool(entry)
            found.append(
                {
                    "index": index,
                    "alive": alive,
                    "pid": node and node.pid,
                    "id": entry.get("node_id"),
                    "resources": resources,
                }
            )
        return found

    def is_alive(self, index: int) -> bool:
        """Return True if the command of node ``index`` is running."""
        node = self._state["nodes"][index]
        return node is not None and process_start(node.pid) == node.began

    def processes(self, index: int) -> set[int]:
        """Return the process ids of node ``index``: the session of its command, and all descendants."""
        node = self._state["nodes"][index]
        return set() if node is None else session_processes(node.pid, node.began)

    def kill_node(self, index: int) -> None:
        """Kill all processes of node ``index`` by SIGKILL, which resembles a power failure of a machine."""
        deadline = time.monotonic() + STOP_TIMEOUT_S
        while pids := self.processes(index):
            send_signal(pids, signal.SIGKILL)
            if time.monotonic() > deadline:
                raise ClusterError(f"processes of node {index} do not end: {sorted(pids)}")
            time.sleep(0.05)
        for command in self._commands:
            command.poll()

    def stop(self) -> None:
        """Kill all nodes of this cluster, and delete ``cluster.json`` and Ray's files; the token and the nodes' logs are kept."""
        with _exclusive(self.directory):
            self._end()

    # ------------------------------------------------------------------------------------------------------ inside

    def _host(self, index: int) -> Host:
        hosts = self._state["hosts"]
        return Host(hosts[index]["address"], tuple(hosts[index]["prefix"])) if hosts else Host()

    def _start_head(self) -> None:
        ports = self._state["ports"]
        arguments = [
            *("--head", f"--port={ports['head']}", "--include-dashboard=true", "--disable-usage-stats"),
            *(f"--dashboard-host={LOOPBACK}", f"--dashboard-port={ports['dashboard']}"),
            f"--ray-client-server-port={ports['client']}",
        ]
        self._launch(0, arguments)
        # Ray writes this file last; other nodes cannot join before it exists.
        self._wait(0, (Path(self._state["folder"]) / "0" / "ray_current_cluster").exists, "the head node")

    def _start_missing(self) -> None:
        """Start all nodes that do not run, except the head, at the same time, and wait until all are listed by Ray."""
        for left in range(_TRIES - 1, -1, -1):
            missing = [index for index in range(1, self.size) if not self.is_alive(index)]
            for index in missing:
                self.kill_node(index)  # processes that the ended command may have left
                self._launch(index, [f"--address={self.address}"])
            try:
                for index in range(self.size):
                    self._wait(index, partial(self._is_listed, index), f"node {index}")
            except ClusterError:
                if not left or not self.is_alive(0):
                    raise
            else:
                return

    def _is_listed(self, index: int) -> bool:
        return bool(self.nodes()[index]["alive"])

    def _launch(self, index: int, arguments: Sequence[str]) -> None:
        state = self._state
        host = self._host(index)
        folder = Path(state["folder"]) / str(index)
        folder.mkdir(exist_ok=True)
        name = f"node-{index}-{secrets.token_hex(3)}"
        command = [
            *host.prefix,
            *(sys.executable, "-c", "from ray.scripts.scripts import main; main()", "start", "--block"),
            *(f"--node-ip-address={host.address}", f"--node-name={name}", f"--temp-dir={folder}"),
            *(f"--num-cpus={state['cpus']}", f"--object-store-memory={state['object_store']}"),
            # 0: the operating system chooses the ports of workers.
            *("--min-worker-port=0", "--max-worker-port=0"),
            f"--dashboard-agent-listen-port={state['ports'][f'agent_{index}']}",
            *arguments,
        ]
        environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_A")}
        environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.directory / "token")}
        process = start_daemon(command, folder, environment, self.directory / f"node-{index}.log", append=False)
        self._commands.append(process)
        self._state["nodes"][index] = Node(process.pid, process_start(process.pid) or 0, name)
        self._save()

    def _wait(self, index: int, ready: Callable[[], Any], what: str) -> Any:
        log = self.directory / f"node-{index}.log"
        deadline = time.monotonic() + START_TIMEOUT_S
        while not (found := ready()):
            if not self.is_alive(index):
                self._append_ray_logs(index, log)
                raise ClusterError(f"{what} of the cluster in {self.directory} ended while it started; see {log}")
            if time.monotonic() > deadline:
                raise ClusterError(f"{what} is not ready after {START_TIMEOUT_S:.0f} s; see {log}")
            time.sleep(0.2)
        return found

    def _append_ray_logs(self, index: int, log: Path) -> None:
        """Append the last lines of Ray's own logs to the node's log, because Ray's files are deleted with the cluster."""
        logs = sorted((Path(self._state["folder"]) / str(index)).glob("session_2*/logs"))
        names = ("ray_process_exit.log", "raylet.out", "raylet.err", "dashboard_agent.log")
        with log.open("a") as file:
            for path in (folder / name for name in names for folder in logs[-1:]):
                if not path.exists():
                    continue
                lines = path.read_text(errors="replace").splitlines()[-_LAST_LINES:]
                file.write("\n".join([f"--- {path.name}", *lines, ""]))

    def _ray_nodes(self) -> list[dict[str, Any]]:
        answer = self._request("/api/v0/nodes?detail=1&limit=1000")
        return answer["data"]["result"]["result"] if answer else []

    def _request(self, path: str) -> Any:
        """Return the dashboard's JSON answer; None if it does not answer."""
        request = urllib.request.Request(self.dashboard + path, headers={"Authorization": f"Bearer {self.token}"})
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy: the address is loopback
        try:
            with opener.open(request, timeout=10) as response:
                return json.load(response)
        except (OSError, ValueError):
            return None

    def _end(self) -> None:
        # Killed at once: a local cluster holds nothing that Ray's slower, graceful shutdown would save.
        for index in reversed(range(self.size)):
            self.kill_node(index)
        shutil.rmtree(self._state["folder"], ignore_errors=True)
        (self.directory / "ray").unlink(missing_ok=True)
        (self.directory / "cluster.json").unlink(missing_ok=True)

    def _save(self) -> None:
        nodes = [node and asdict(node) for node in self._state["nodes"]]
        write_private(self.directory / "cluster.json", json.dumps(self._state | {"nodes": nodes}, indent=2) + "\n")
        link = self.directory / "ray"
        if not link.is_symlink():
            link.symlink_to(self._state["folder"])


def _new_state(nodes: int, cpus: int | None, hosts: Sequence[Host]) -> dict[str, Any]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpus": cpus or max(1, (os.cpu_count() or 1) // nodes),
        "object_store": int(min(_STORE_MOST, max(_STORE_LEAST, _STORE_FRACTION * memory / nodes))),
        "hosts": [asdict(host) for host in hosts],
        "nodes": [None] * nodes,
        "ports": _free_ports(["head", "dashboard", "client", *(f"agent_{index}" for index in range(nodes))]),
        # A short path, because Ray makes sockets in it, whose paths have a maximum length.
        "folder": tempfile.mkdtemp(prefix="vilseg-ray-", dir="/tmp"),
    }


def _free_ports(names: Sequence[str]) -> dict[str, int]:
    """Return a free port for every name, chosen at random, because other programs may search at the same time."""
    ports: dict[str, int] = {}
    with ExitStack() as held:  # all are held until all are chosen, so that none is chosen twice
        for name in names:
            while name not in ports:
                listener = held.enter_context(socket.socket())
                port = random.choice(_PORTS)
                try:
                    listener.bind((LOOPBACK, port))
                except OSError:
                    continue
                ports[name] = port
    return ports


# ----------------------------------------------------------------------------------------------------------- files


def _exclusive(directory: Path) -> AbstractContextManager[None]:
    return exclusive_lock(directory, "cluster.lock", ClusterError, "the cluster cannot keep its state")
