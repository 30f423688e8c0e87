"""`vilseg doctor`: its findings; it neither hangs nor prints secrets."""

import socket
import threading
import time
from collections.abc import Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from cli import diagnostics as doctor
from cli.diagnostics import Finding

KEYS = {"AWS_ACCESS_KEY_ID": "KEY-FOR-TEST", "AWS_SECRET_ACCESS_KEY": "SECRET-FOR-TEST"}


def by_name(findings: Iterator[Finding]) -> dict[str, Finding]:
    found = {finding.what: finding for finding in findings}
    assert all(finding.mend for finding in found.values() if finding.status != "ok"), (
        "what is not ok says how to mend it"
    )
    assert "SECRET-FOR-TEST" not in str(found)
    return found


class Store(BaseHTTPRequestHandler):
    """The one answer of S3 that is asked for, with a clock of its own."""

    skew = 0.0
    status, body = (
        200,
        b"<ListAllMyBucketsResult><Buckets><Bucket><Name>mine</Name></Bucket></Buckets></ListAllMyBucketsResult>",
    )

    def do_GET(self) -> None:
        self.send_response_only(self.status)
        self.send_header("Date", formatdate(time.time() + self.skew, usegmt=True))
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, *arguments: object) -> None:
        """Nothing."""


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Store]]:
    class Mine(Store):
        pass

    with HTTPServer(("127.0.0.1", 0), Mine) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        for name, value in KEYS.items():
            monkeypatch.setenv(name, value)
        yield Mine
        server.shutdown()


def test_versions_outside_the_ranges_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert by_name(doctor._packages())["packages"].status == "ok"
    metadata = tmp_path / "vilseg-9.dist-info" / "METADATA"
    metadata.parent.mkdir()
    needed = ("numpy>=999", "no-such-package>=1", "pyyaml>=1", "rasterio>=999; extra == 'geo'")
    lines = ["Metadata-Version: 2.1", "Name: vilseg", "Version: 9", *(f"Requires-Dist: {text}" for text in needed)]
    metadata.write_text("\n".join(lines) + "\n\n")
    monkeypatch.syspath_prepend(tmp_path)
    _, numpy, absent = list(doctor._packages())
    assert (numpy.status, absent.status) == ("missing", "missing")
    assert ">=999" in numpy.found
    assert absent.mend == "pip install 'no-such-package>=1'"


def test_store_that_answers(store: type[Store]) -> None:
    found = by_name(doctor._store([]))
    assert found["object store"].status == "ok"
    assert "mine" in found["object store"].found
    assert found["clock"].status == "ok"


@pytest.mark.parametrize(("skew", "status"), [(-20, "ok"), (120, "warning"), (-3600, "missing")])
def test_clock_of_the_store(store: type[Store], skew: float, status: str) -> None:
    store.skew = skew
    assert by_name(doctor._store([]))["clock"].status == status


@pytest.mark.parametrize(
    ("code", "status", "mend"),
    [
        ("InvalidAccessKeyId", "missing", "AWS_ACCESS_KEY_ID"),
        ("RequestTimeTooSkewed", "missing", "clock"),
        ("AccessDenied", "ok", ""),
    ],
)
def test_store_that_refuses(store: type[Store], code: str, status: str, mend: str) -> None:
    store.status, store.body = 403, f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode()
    found = by_name(doctor._store([]))["object store"]
    assert found.status == status
    assert mend in found.mend


def test_store_that_is_not_there(no_server: str) -> None:
    found = by_name(doctor._store(["s3://vilseg/x"]))
    assert found["object store"].status == "missing"
    assert no_server in found["object store"].found
    assert "store s3://vilseg/x" not in found, "it need not be tried"


def test_no_store_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", *KEYS):
        monkeypatch.delenv(name, raising=False)
    assert by_name(doctor._store([]))["object store"].status == "optional"


def test_half_a_key_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "KEY")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY", raising=False)
    assert "set both" in by_name(doctor._store([]))["object store"].mend


def test_folder_is_written_to_and_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor._writable(str(tmp_path)).status == "ok"
    assert doctor._writable(str(tmp_path / "none")).status == "missing"
    assert list(tmp_path.iterdir()) == []


def test_cluster_that_is_not_there() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = time.monotonic()
    for address in (f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}", "127.0.0.1:none"):
        assert by_name(doctor._cluster(address))["cluster"].status == "missing"
    assert time.monotonic() < started + 3 * doctor._CONNECT_S


def test_room(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = by_name(doctor._disks()) | by_name(doctor._memory())
    assert {"disk: working folder", "disk: temporary files", "disk: Ray", "memory"} <= found.keys()
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / "none"))
    assert by_name(doctor._disks())["disk: Ray"].status == "missing"
