"""Implementation of ``vilseg serve``: run the application on this machine or a cluster until SIGINT or SIGTERM."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from cluster.ray_session import Session
from serve.api_keys import ApiKeys
from serve.config import ServeConfig
from serve.middleware import is_loopback
from serve.rollout import LOG_DIRECTORY
from vilseg.config import absolute_locations
from vilseg.errors import ConfigError, UserError
from vilseg.model.serialization import read_segmentation_config

APP = "vilseg"

RAY_SERVE_ENVIRONMENT = {
    # All handlers are asynchronous or start their own threads, so Ray's event loops need no extra threads. This saves six
    # thread switches per request.
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    "RAY_SERVE_LOG_TO_STDERR": "0",
    "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1000",
}
"""Environment variables for Ray's processes; they reduce the time of a request by a tenth on two cores."""


def prepare_environment() -> None:
    """Set those variables of `RAY_SERVE_ENVIRONMENT` that the user has not set; call this before Ray is started."""
    for name, value in RAY_SERVE_ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def check_config(config: ServeConfig, host: str, port: int) -> None:
    """Check the configuration before anything is started.

    Args:
        config: Configuration of the deployment.
        host: Address to listen on.
        port: Port to listen on.

    Raises:
        ConfigError: Other machines could reach a server without keys, or the port is in use.
        ModelError: The URI of a model is not a model directory.
        StorageError: The URI of a model or of the key file cannot be read.
    """
    if config.keys is None and not is_loopback(_address(host)):
        raise ConfigError(
            f"--host {host} lets others reach this server, which has no API keys; make one by "
            "'vilseg key NAME --file keys.txt' and give --keys keys.txt, or leave --host at 127.0.0.1"
        )
    if config.keys is not None:
        ApiKeys(config.keys)
    for uri in config.models.values():
        read_segmentation_config(uri)
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"--port {port} of {host} cannot be used: {error.strerror}; choose another --port"
            ) from error


def fit_to_cluster(config: ServeConfig, session: Session) -> ServeConfig:
    """Return the configuration with absolute URIs, and with ``replicas.maximum`` reduced to the resources of the cluster.

    Raises:
        ConfigError: The cluster has no resources for ``replicas.minimum`` replicas.
    """
    replicas = config.replicas
    gpus = replicas.gpus or float(session.gpus > 0)
    room = [session.cpus / replicas.cpus if replicas.cpus else float(replicas.maximum)]
    if gpus:
        room.append(session.gpus / gpus)
    most = min(replicas.maximum, int(min(room)))
    if most < replicas.minimum:
        raise ConfigError(
            f"replicas.minimum is {replicas.minimum}, but there is room for {most} of {replicas.cpus:g} CPUs "
            f"and {gpus:g} GPUs each; lower replicas.minimum, cpus or gpus"
        )
    return absolute_locations(config.replace(replicas=replicas.replace(maximum=most, gpus=gpus)))


def _address(host: str) -> str:
    return "127.0.0.1" if host == "localhost" else host


@contextmanager
def running(config: ServeConfig, *, host: str, port: int) -> Iterator[str]:
    """Run the application on the connected Ray cluster for the duration of the ``with`` block; yield its URL once it responds.

    Args:
        config: Configuration of the deployment.
        host: Address to listen on.
        port: Port to listen on.

    Raises:
        UserError: The application could not be started.
    """
    from ray import serve

    from serve.deployment import build

    serve.start(http_options={"host": _address(host), "port": port, "request_timeout_s": None})
    try:
        try:
            serve.run(build(config), name=APP, route_prefix="/", logging_config={"enable_access_log": False})
        except RuntimeError as error:
            reason = failure_reason(serve.status().applications.get(APP)) or str(error)
            raise UserError(f"the deployment could not be started: {reason}") from error
        shown = "127.0.0.1" if host in ("0.0.0.0", "::") else host
        yield f"http://[{shown}]:{port}" if ":" in shown else f"http://{shown}:{port}"
    finally:
        # serve.shutdown alone would stop the HTTP proxy before requests in progress get their responses.
        with suppress(KeyError):
            serve.delete(APP)
        serve.shutdown()


def failure_reason(status: Any) -> str:
    """Return the reason why an application failed to start, as a clause; "" if its status has none.

    Args:
        status: `ray.serve.schema.ApplicationStatusOverview` of the application, or None.
    """
    if status is None:
        return ""
    failed = {name: found.message for name, found in status.deployments.items() if "Error:" in found.message}
    # The last line that names an exception has the message of the exception in the failed constructor.
    texts = [status.message, *failed.values()]
    lines = [
        line.strip().split("Error:", 1)[1].strip() for text in texts for line in text.splitlines() if "Error:" in line
    ]
    sentences = [line for line in lines if line]
    if sentences:
        return sentences[-1]
    if failed:
        # A process that was killed has no exception, and Ray's message does not state the reason.
        return f"the processes of '{next(iter(failed))}' ended while they started; the reason is in {LOG_DIRECTORY}"
    return ""


def main(config: ServeConfig, session: Session, *, host: str, port: int, ready: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM; then accept no new requests, finish those in progress, and return.

    Args:
        config: Configuration that `check_config` has checked.
        session: Connection to Ray.
        host: Address to listen on.
        port: Port to listen on.
        ready: Function that is called with the URL once the server responds.
    """
    stop = threading.Event()
    before: Mapping[signal.Signals, Any] = {
        number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        with running(fit_to_cluster(config, session), host=host, port=port) as url:
            ready(url)
            while not stop.wait(1):  # on some systems, a signal does not interrupt a wait without timeout
                pass
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
