"""Checks of ``vilseg doctor``: installed packages, reachable services, disks and memory, with remedies for problems.

Every check has a short timeout, and none prints secrets.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, Literal

from vilseg import storage
from vilseg.errors import UserError

Status = Literal["ok", "warning", "missing", "optional"]
"""Status of a finding. ``optional``: something that is not installed or configured, and is not required."""

_CONNECT_S = 3.0
"""Timeout of a TCP connection in seconds."""
_CLUSTER_S = 30.0
"""Timeout of a driver that connects to a cluster, in seconds. Importing Ray takes seconds, and with a wrong token Ray retries for
a long time."""
_SKEW_S = 60.0
"""Clock difference to the object store, in seconds, from which on a warning is given."""
_MOST_SKEW_S = 900.0
"""Clock difference, in seconds, from which on S3 rejects requests."""
_GB = 1e9
_EXTRAS = {
    "rasterio": ("geo", "GeoTIFF"),
    "av": ("video", "videos"),
    "onnx": ("export", "ONNX"),
    "mlflow": ("tracking", "MLflow"),
}
_DRIVER = """
import json, logging, sys
import ray
ray.init(address=sys.argv[1], logging_level=logging.ERROR, log_to_driver=False)
print(json.dumps({"machines": sum(node["Alive"] for node in ray.nodes()), **ray.cluster_resources()}))
"""


@dataclass(frozen=True)
class Finding:
    """Result of one check."""

    what: str
    """Name of the checked item."""
    status: Status
    found: str
    """State of the item."""
    mend: str = ""
    """Remedy; empty if the status is ok."""


def main(*, address: str | None = None, stores: Sequence[str] = ()) -> Iterator[Finding]:
    """Run all checks one by one, and yield their findings.

    Args:
        address: address of a Ray cluster or of its job server; None skips the check of a cluster.
        stores: URIs of folders, in each of which a small object is written, read and deleted.
    """
    checks: list[Callable[[], Iterator[Finding]]] = [_packages, _torch, _ray]
    checks += [lambda: _cluster(address)] if address else []
    checks += [lambda: _store(stores), _disks, _memory, _extras]
    for check in checks:
        try:
            yield from check()
        except ImportError as error:  # of a package that `_packages` has reported
            yield Finding("packages", "missing", f"without {error.name} the rest cannot be told", "see above")


# ---------------------------------------------------------------------------------------------------- what is installed


def _packages() -> Iterator[Finding]:
    # No check of the version: an older Python could not parse this file.
    yield Finding("Python", "ok", f"{platform.python_version()} at {sys.executable}")
    try:
        from packaging.requirements import Requirement

        needed = [Requirement(text) for text in importlib.metadata.requires("vilseg") or []]
    except ImportError as error:  # also PackageNotFoundError, a subclass
        yield Finding(
            "packages", "missing", f"{error.name} is not installed", "install vilseg: make setup, or pip install -e ."
        )
        return
    needed = [one for one in needed if one.marker is None or one.marker.evaluate({"extra": ""})]
    wrong = 0
    for requirement in needed:
        version = _version(requirement.name)
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            wrong += 1
            state = "is not installed" if version is None else f"is {version}, but {requirement.specifier} is needed"
            yield Finding("packages", "missing", f"{requirement.name} {state}", f"pip install '{requirement}'")
    if not wrong:
        yield Finding("packages", "ok", f"all {len(needed)}, vilseg {_version('vilseg')}")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _torch() -> Iterator[Finding]:
    try:
        import torch
    except (ImportError, OSError) as error:
        yield Finding(
            "torch", "missing", f"cannot be imported: {_last_line(error)}", "pip install --force-reinstall torch"
        )
        return
    yield Finding("torch", "ok", torch.__version__)
    if not torch.cuda.is_available():
        if Path("/dev/nvidia0").exists() or Path("/dev/nvidiactl").exists():
            found = "this machine has one, but torch cannot use it"
            mend = "install a torch for CUDA; in a container start it with --gpus all; nvidia-smi tells of the driver"
            yield Finding("GPU", "warning", found, mend)
        else:
            yield Finding("GPU", "ok", "none; the CPU is used")
        return
    for number in range(torch.cuda.device_count()):
        name = torch.cuda.get_device_name(number)
        try:
            torch.ones(8, device=f"cuda:{number}").sum().item()
        except RuntimeError as error:
            yield Finding(
                "GPU", "missing", f"{number}: {name} does not compute: {_last_line(error)}",
                "look at nvidia-smi: is its memory taken, or its driver too old for this torch?",
            )  # fmt: skip
            continue
        memory = torch.cuda.get_device_properties(number).total_memory
        yield Finding("GPU", "ok", f"{number}: {name}, {memory / _GB:.0f} GB")


def _ray() -> Iterator[Finding]:
    try:
        import ray
    except (ImportError, OSError) as error:
        yield Finding(
            "Ray", "missing", f"cannot be imported: {_last_line(error)}", "pip install 'ray[train,data,serve,tune]'"
        )
        return
    yield Finding("Ray", "ok", ray.__version__)


def _extras() -> Iterator[Finding]:
    for name, (extra, use) in _EXTRAS.items():
        version = _version(name)
        if version is not None:
            yield Finding(name, "ok", version)
        else:
            yield Finding(name, "optional", f"not installed; it is for {use}", f"pip install 'vilseg[{extra}]'")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium:
        yield Finding("chromium", "ok", chromium)
    else:
        yield Finding(
            "chromium", "optional", "not installed; it is for the tests of the page", "apt-get install chromium"
        )


# ---------------------------------------------------------------------------------------------------- what is reachable


def _cluster(address: str) -> Iterator[Finding]:
    if address.startswith(("http://", "https://")):
        yield from _job_server(address)
        return
    if address not in ("auto", "local"):
        host, _, port = address.partition("://")[2].rpartition(":") if "://" in address else address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S).close()
        except (OSError, ValueError) as error:
            yield Finding(
                "cluster", "missing", f"nothing answers at {address}: {_last_line(error)}",
                "is it up, and is the address right? vilseg takes HEAD:6379, ray://HEAD:10001 or http://HEAD:8265",
            )  # fmt: skip
            return
    try:
        done = subprocess.run(
            [sys.executable, "-c", _DRIVER, address],
            capture_output=True, text=True, timeout=_CLUSTER_S, check=False, start_new_session=True,
        )  # fmt: skip
        said, failed = done.stdout + done.stderr, done.returncode != 0
    except subprocess.TimeoutExpired:
        said, failed = f"no connection after {_CLUSTER_S:.0f} s", True
    if not failed:
        found = json.loads(done.stdout.strip().splitlines()[-1])
        text = f"{address}: {found['machines']} machines, {found.get('CPU', 0):g} CPUs, {found.get('GPU', 0):g} GPUs"
        yield Finding("cluster", "ok", text)
        return
    mismatch = re.search(r"cluster was started with:\s+Ray: (\S+)\s+Python: (\S+)", said)
    if mismatch:
        yield _versions(mismatch[1], mismatch[2])
        return
    yield Finding(
        "cluster", "missing", f"{address} lets no driver in: {(said.strip().splitlines() or ['it ended'])[-1]}",
        "is the token right? RAY_AUTH_MODE=token and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH; does a cluster run there?",
    )  # fmt: skip


def _job_server(address: str) -> Iterator[Finding]:
    from cli.submit.job_server import JobServer

    try:
        server = JobServer(address.rstrip("/"), timeout=(_CONNECT_S, 10))
        ray_version, python_version = server.versions()
    except UserError as error:
        problem, _, mend = str(error).partition("; ")
        yield Finding("cluster", "missing", problem, mend)
        return
    yield _versions(ray_version, python_version)


def _versions(ray_version: str, python_version: str) -> Finding:
    import ray

    ours, theirs = (ray.__version__, platform.python_version()), (ray_version, python_version)
    text = f"Ray {ray_version}, Python {python_version}"
    if ours == theirs:
        return Finding("cluster", "ok", f"{text}, as here")
    mend = "install the same Ray and the same Python on both, down to the last number"
    return Finding("cluster", "missing", f"{text}, but here Ray {ours[0]}, Python {ours[1]}", mend)


def _store(stores: Sequence[str]) -> Iterator[Finding]:
    if any(os.environ.get(name) for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID")) or any(
        uri.startswith("s3://") for uri in stores
    ):
        try:
            yield from _s3()
        except _NoAnswer:
            return
    else:
        yield Finding("object store", "optional", "AWS_ENDPOINT_URL and AWS_ACCESS_KEY_ID are not set",
                      'for s3:// URIs set them; a store on this machine: eval "$(vilseg store up)"')  # fmt: skip
    for uri in stores:
        yield _writable(uri)


class _NoAnswer(Exception):  # noqa: N818
    """Raised if the object store does not answer or rejects the keys, so that no further check of it is possible."""


def _s3() -> Iterator[Finding]:
    """Check that the object store answers, accepts the keys, and has the same clock as this machine."""
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    from vilseg.storage import s3

    where = "the object store"
    try:
        settings = s3.read_settings()
        where = settings.endpoint or "Amazon S3"
        options = Config(connect_timeout=_CONNECT_S, read_timeout=5, retries={"total_max_attempts": 1})
        client = boto3.client(
            "s3", endpoint_url=settings.endpoint, region_name=settings.region or "us-east-1", config=options
        )
        answer: Any = client.list_buckets()
        names = [bucket["Name"] for bucket in answer["Buckets"]]
        yield Finding(
            "object store", "ok", f"{where}, buckets: {', '.join(names[:5]) or 'none'}{'…' * (len(names) > 5)}"
        )
    except UserError as error:
        problem, _, mend = str(error).partition(": ")
        yield Finding("object store", "missing", problem, mend)
        raise _NoAnswer from error
    except ClientError as error:
        answer = error.response
        code = answer["Error"]["Code"]
        if code == "AccessDenied":  # these keys may not list buckets, but may be allowed to use one
            yield Finding(
                "object store", "ok", f"{where}; the keys may not list buckets, so name one by --store s3://…"
            )
        else:
            mend = "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; for the embedded store: vilseg store up"
            if code == "RequestTimeTooSkewed":
                mend = "set this machine's clock, by NTP for example"
            yield Finding("object store", "missing", f"{where} refuses: {code}", mend)
            yield from _clock(answer)
            raise _NoAnswer from error
    except BotoCoreError as error:
        found = f"{where} does not answer ({type(error).__name__})"
        mend = "is AWS_ENDPOINT_URL right, and does the store run? the embedded one is started by: vilseg store up"
        if type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound"):
            found, mend = "no credentials found", "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        yield Finding("object store", "missing", found, mend)
        raise _NoAnswer from error
    yield from _clock(answer)


def _clock(answer: Any) -> Iterator[Finding]:
    date = answer["ResponseMetadata"].get("HTTPHeaders", {}).get("date")
    if date is None:
        return
    skew = time.time() - parsedate_to_datetime(date).timestamp()
    text = f"{abs(skew):.0f} s {'before' if skew > 0 else 'behind'} the object store's"
    if abs(skew) < _SKEW_S:
        yield Finding("clock", "ok", "as the object store's")
    else:
        status: Status = "missing" if abs(skew) >= _MOST_SKEW_S else "warning"
        yield Finding("clock", status, text, "set this machine's clock, by NTP for example")


def _writable(uri: str) -> Finding:
    """Check that a small object can be written to the folder ``uri``, read back and deleted."""
    what = f"store {uri}"
    try:
        if storage.is_local(uri) and not storage.is_folder(uri):
            return Finding(what, "missing", f"{uri} is no folder", "make it, or name another")
        probe = storage.join(uri, f".vilseg-doctor-{secrets.token_hex(8)}")
        storage.write_bytes(probe, b"doctor")
        try:
            same = storage.read_bytes(probe) == b"doctor"
        finally:
            storage.delete(probe)
    except UserError as error:
        problem, _, mend = str(error).partition("; ")
        return Finding(what, "missing", problem, mend or "check what the URI names, and what the keys may do there")
    if not same:
        return Finding(what, "missing", "what was written reads otherwise", "look at the store's own log")
    return Finding(what, "ok", "written, read and deleted")


# --------------------------------------------------------------------------------------------------- what there is room for


def _disks() -> Iterator[Finding]:
    ray_folder = Path(os.environ.get("RAY_TMPDIR", "/tmp"))
    places = {
        "disk: working folder": Path.cwd(),
        "disk: temporary files": Path(tempfile.gettempdir()),
        "disk: Ray": ray_folder,
    }
    for what, place in places.items():
        try:
            total, _, free = shutil.disk_usage(place)
            writable = os.access(place, os.W_OK)
        except OSError as error:
            yield Finding(what, "missing", f"{place}: {error.strerror}", "make the folder, or name another")
            continue
        found = f"{free / _GB:.1f} of {total / _GB:.0f} GB free at {place}"
        if not writable and place == Path.cwd():
            yield Finding(what, "warning", f"{place} cannot be written", "results need another folder, or s3:// URIs")
        elif not writable:
            yield Finding(what, "missing", f"{place} cannot be written", "set TMPDIR (RAY_TMPDIR for Ray) to another")
        elif free < 1e9:
            yield Finding(what, "missing", found, "make room, or set TMPDIR (RAY_TMPDIR for Ray) to another disk")
        elif free < 0.05 * total:  # Ray stops writing objects to a disk with less free space
            yield Finding(what, "warning", found, "make room: Ray writes no objects to a disk of which 95 % are used")
        else:
            yield Finding(what, "ok", found)


def _memory() -> Iterator[Finding]:
    total, free = _memory_bytes()
    found = f"{free / _GB:.1f} of {total / _GB:.1f} GB free"
    if free < 1.5e9:
        yield Finding("memory", "warning", found, "end other programs: Ray with two workers takes about 3 GB")
    else:
        yield Finding("memory", "ok", found)
    if not Path("/dev/shm").is_dir():
        return
    shared = shutil.disk_usage("/dev/shm")
    found = f"{shared.free / _GB:.1f} of {shared.total / _GB:.1f} GB free at /dev/shm"
    if shared.total < 0.25 * total:
        mend = (
            f"give a container --shm-size={max(1, round(0.3 * total / _GB))}g; Ray's objects lie on the disk otherwise"
        )
        yield Finding("shared memory", "warning", found, mend)
    else:
        yield Finding("shared memory", "ok", found)


def _memory_bytes() -> tuple[float, float]:
    """Return total and available memory in bytes; those of the container if it has a lower limit than the machine."""
    pages = {name: os.sysconf(name) * os.sysconf("SC_PAGE_SIZE") for name in ("SC_PHYS_PAGES", "SC_AVPHYS_PAGES")}
    total, free = float(pages["SC_PHYS_PAGES"]), float(pages["SC_AVPHYS_PAGES"])
    if Path("/proc/meminfo").exists():
        match = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
        free = float(match[1]) * 1024 if match else free
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and limit.read_text().strip().isdecimal():
        bound = float(limit.read_text())
        total, free = min(total, bound), min(free, bound - float(used.read_text()))
    return total, free


def _last_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]
