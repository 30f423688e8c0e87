"""``vilseg serve``: the application on this machine or a cluster, until it is told to stop."""

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
from vilseg import storage
from vilseg.errors import ConfigError, UserError
from vilseg.model.serialization import read_segmentation_config

APP = "vilseg"

RAY_SERVE_ENVIRONMENT = {
    # Our own threads have the work, so Ray's loops need none of their own: a request changes threads six times less.
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    "RAY_SERVE_LOG_TO_STDERR": "0",
    "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1000",
}
"""For Ray's processes, to be set where they are started; they save a tenth of the time of a request here."""


def prepare_environment() -> None:
    """Set what makes Ray Serve quick, as far as the user has not; before Ray is started."""
    for name, value in RAY_SERVE_ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def check_config(config: ServeConfig, host: str, port: int) -> None:
    """Say what would not work before anything is started.

    Raises:
        ConfigError: others could reach a server without keys, or the port is taken.
        ModelError: no model folder.
        StorageError: a URI cannot be reached.
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
    """The configuration with places that other processes find, and no more replicas than there is room for."""
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
    return config.model_copy(
        update={
            "models": {name: _absolute(uri) for name, uri in config.models.items()},
            "keys": config.keys and _absolute(config.keys),
            "examples": config.examples and _absolute(config.examples),
            "replicas": replicas.model_copy(update={"maximum": most, "gpus": gpus}),
            "videos": config.videos.model_copy(update={"storage": _absolute(config.videos.storage)}),
        }
    )


def _absolute(uri: str) -> str:
    """Absolute where it is a folder of this machine; a hub id stays one."""
    return storage.absolute(uri) if storage.exists(uri) or "/" not in uri or uri.startswith(".") else uri


def _address(host: str) -> str:
    return "127.0.0.1" if host == "localhost" else host


@contextmanager
def running(config: ServeConfig, *, host: str, port: int) -> Iterator[str]:
    """The application on the Ray cluster that this process is connected to; yields its URL once it answers.

    Raises:
        UserError: it could not be started, as a sentence.
    """
    from ray import serve

    from serve.deployment import build

    serve.start(http_options={"host": _address(host), "port": port, "request_timeout_s": None})
    try:
        try:
            serve.run(build(config), name=APP, route_prefix="/", logging_config={"enable_access_log": False})
        except RuntimeError as error:
            reason = _reason(serve.status().applications.get(APP)) or str(error)
            raise UserError(f"the deployment could not be started: {reason}") from error
        shown = "127.0.0.1" if host in ("0.0.0.0", "::") else host
        yield f"http://[{shown}]:{port}" if ":" in shown else f"http://{shown}:{port}"
    finally:
        # Shutting down alone would take the entrance away from those who wait for an answer.
        with suppress(KeyError):
            serve.delete(APP)
        serve.shutdown()


def _reason(status: Any) -> str:
    """The last line that says something of why a deployment failed."""
    if status is None:
        return ""
    texts = [status.message, *(deployment.message for deployment in status.deployments.values())]
    lines = [line.strip() for text in texts for line in text.splitlines() if "Error:" in line]
    return lines[-1].split("Error:", 1)[1].strip() if lines else ""


def main(config: ServeConfig, session: Session, *, host: str, port: int, ready: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM; then what is being worked on is finished, and nothing new is let in.

    Args:
        config: checked by `check_config`.
        session: the connection to Ray.
        host: address to listen on.
        port: port to listen on.
        ready: told the URL once the server answers.
    """
    stop = threading.Event()
    before: Mapping[signal.Signals, Any] = {
        number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        with running(fit_to_cluster(config, session), host=host, port=port) as url:
            ready(url)
            while not stop.wait(1):  # a wait without end would not be interrupted by a signal everywhere
                pass
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
