"""Preparation of a command for a cluster: checks, adaptation of its arguments, and collection of code, files and variables."""

from __future__ import annotations

import difflib
import fnmatch
import ipaddress
import os
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cli.overrides import split_overrides
from cluster.ray_session import forwarded_environment
from vilseg import storage
from vilseg.config import RunConfig
from vilseg.config.locations import Location, LocationKind, is_hub_id, list_locations
from vilseg.errors import StorageError, UserError

_REFUSED = {
    "submit": "is what you call already",
    "cluster": "works on this machine only",
    "store": "works on this machine only",
}
"""Commands that cannot run as jobs, and the reason."""

FILES = {"config", "space", "classes", "keys"}
"""Parameters of commands that name a small local file, which is sent with the job."""
PLACES = {"places", "inputs", "dataset", "out", "file", "store"}
"""Parameters that name data to read or write on the machine where the job runs."""
MODELS = {"model"}
"""Parameters that name a model: a path, a URI or a hub id."""
PACKAGES = ("vilseg", "jobs", "serve", "tune", "cluster", "cli")
"""Python packages that are sent with a job."""
_LEFT_OUT = (
    *(".*", "__pycache__", "*.egg-info", "node_modules", "runs", "store"),
    *("*.pem", "*.key", "*secret*", "*credential*", "*token", "id_rsa*", "id_ed25519*", "identities.json"),
)
"""Name patterns of files in a user's folder that are not sent, because they are generated, large or secret."""
_MOST_BYTES = 100_000_000
"""Maximum size of a user's folder that is sent, in bytes."""
_OF_THIS_MACHINE = (
    *("AWS_PROFILE", "AWS_DEFAULT_PROFILE", "AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE", "AWS_CA_BUNDLE"),
    *("AWS_WEB_IDENTITY_TOKEN_FILE", "HF_HOME", "HF_HUB_CACHE", "HF_ASSETS_CACHE", "HF_TOKEN_PATH"),
)
"""Environment variables that name local files, and are therefore useless on another machine."""


@dataclass(frozen=True)
class Verb:
    """One invocation of a ``vilseg`` subcommand, with its arguments already validated."""

    arguments: Sequence[str]
    """Name of the subcommand, followed by its arguments."""
    parameters: dict[str, Any]
    """Values by parameter name, as the subcommand's own parser returns them."""
    takes_address: bool
    """The subcommand has the option ``--address``."""
    configured: dict[str, str]
    """Paths and URIs in the subcommand's configuration, by configuration key."""
    files: dict[str, Path]
    """Local files by the name of the parameter that names them."""


@dataclass(frozen=True)
class Job:
    """Subcommand prepared to run as a job on a cluster."""

    verb: str
    """Name of the subcommand."""
    command: str
    """Command line that the user would type without ``submit``."""
    entrypoint: str
    """Shell command that the cluster runs."""
    files: dict[str, Path]
    """Local path of each file to send, by its path relative to the working folder of the job."""
    notes: list[str]
    """Sentences to show to the user."""


def check(vilseg: Any, arguments: Sequence[str]) -> Verb:
    """Parse and check the arguments of a subcommand as the subcommand itself does, before anything is sent.

    Args:
        vilseg: the ``vilseg`` command with all subcommands, a click group.
        arguments: name of the subcommand, followed by its arguments.

    Raises:
        UserError: the subcommand does not exist or cannot run as a job, a file is missing, or the configuration is wrong.
        typer.TyperException: the subcommand does not accept the arguments.
    """
    name, *rest = arguments
    if name in _REFUSED:
        raise UserError(f"'{name}' {_REFUSED[name]} and is no job; run it without 'vilseg submit'")
    if name not in vilseg.commands:
        known = sorted(set(vilseg.commands) - set(_REFUSED))
        near = difflib.get_close_matches(name, known, 1)
        raise UserError(
            f"there is no verb '{name}'; " + (f"did you mean '{near[0]}'?" if near else f"there are {', '.join(known)}")
        )
    command = vilseg.commands[name]
    parameters = command.make_context(f"vilseg {name}", rest).params
    found = {option: _file(option, parameters[option]) for option in sorted(FILES & parameters.keys())}
    return Verb(
        arguments,
        parameters,
        takes_address=any(parameter.name == "address" for parameter in command.params),
        configured=dict(_configured(name, parameters)),
        files={option: path for option, path in found.items() if path is not None},
    )


def fit(verb: Verb, *, here: bool) -> Job:
    """Adapt the arguments of a subcommand so that it can run on a cluster, and return it as a job.

    Args:
        verb: subcommand returned by `check`.
        here: True if the cluster consists of this machine only, so that paths are valid for the job too.

    Raises:
        StorageError: ``here`` is False, and the arguments or the configuration contain a relative path, which is valid only on
            this machine.
    """
    name, *rest = verb.arguments
    files: dict[str, Path] = {}
    notes = []
    if not here:
        for number, (option, path) in enumerate(verb.files.items()):
            sent = f"given/{number}/{path.name}"
            files[sent] = path
            rest = [_replaced(argument, verb.parameters[option], sent) for argument in rest]
        named = [*_places(verb.parameters), *((f"{key}={place}", place) for key, place in verb.configured.items())]
        absolute = [place for written, place in named if _is_path_there(written, place)]
        if absolute:
            notes.append(
                f"{', '.join(dict.fromkeys(absolute))}: taken as paths of the cluster's machines, not of this one"
            )
    if name == "key":
        notes.append("the key will be in the job's log, which everybody with the cluster's token can read")
    if verb.takes_address and verb.parameters["address"] is None:
        rest = ["--address", "auto", *rest]
    folder = ["--folder", os.getcwd()] if here else []
    # exec replaces the shell by Python, so that signals reach Python.
    python = ["exec", sys.executable if here else "python", "-m", "cli.job_entrypoint"]
    return Job(
        verb=name,
        command=shlex.join(["vilseg", *verb.arguments]),
        entrypoint=shlex.join([*python, *folder, "--", name, *rest]),
        files=files,
        notes=notes,
    )


def _file(name: str, value: str | None) -> Path | None:
    """Return the local file that an option names; None if its value is None, a URI, or class names instead of a file."""
    if value is None or not storage.is_local(value):
        return None
    path = Path(storage.absolute(value))
    if path.is_file():
        return path
    if name == "classes" and not value.endswith((".txt", ".yaml", ".yml")) and "/" not in value:
        return None
    raise StorageError(f"--{name} {value} does not exist; give a file of this machine or an s3:// URI")


def _replaced(argument: str, value: str, by: str) -> str:
    option, equals, given = argument.partition("=")
    if option.startswith("--") and equals and given == value:
        return f"{option}={by}"
    return by if argument == value else argument


def _places(parameters: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the paths and URIs in the arguments: each as the user wrote it (with its option), and the path or URI itself."""
    positional = [*parameters.get("places", ()), *parameters.get("inputs", ())]
    yield from ((place, place) for place in split_overrides(positional)[0])
    for name in sorted(parameters.keys() & ((PLACES | MODELS) - {"places", "inputs"})):
        value = parameters.get(name)
        for written in value if isinstance(value, list | tuple) else [] if value is None else [str(value)]:
            place = written
            if name == "dataset":
                place = written.partition(":")[2]
            elif name in MODELS:
                place = written.partition("=")[2] or written
            if name not in MODELS or not is_hub_id(place):
                yield f"--{name} {written}", place


def _configured(verb: str, parameters: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the paths and URIs in a subcommand's configuration, each with its configuration key.

    Raises:
        UserError: the configuration is wrong, with the error of the subcommand itself.
    """
    overrides = parameters.get("overrides") or []
    locations: list[Location] = []
    if verb in ("train", "tune"):
        locations += list_locations(RunConfig.load(parameters["config"], overrides))
    if verb == "tune":
        from tune.search_space import SearchSpace

        space = SearchSpace.load(parameters["space"])
        locations += list_locations(space.replace(dataset=None) if parameters["dataset"] else space)
    if verb == "serve":
        from serve.config import ServeConfig

        locations += list_locations(ServeConfig.of(parameters["config"], parameters["model"] or [], None, overrides))
    for location in locations:
        if location.kind is not LocationKind.MODEL or not is_hub_id(location.uri):
            yield location.key, location.uri


def _is_path_there(written: str, place: str) -> bool:
    """Return True if ``place`` is an absolute path, which the cluster's machines may have, and False if it is a URI.

    Raises:
        StorageError: ``place`` is a relative path, which is valid only on this machine.
    """
    if not storage.is_local(place):
        return False
    if place.startswith("file://") or os.path.isabs(place):
        return True
    raise StorageError(
        f"{written} names a path of this machine, which the cluster does not see; "
        "give an s3:// URI, or an absolute path that every machine of the cluster has"
    )


# -------------------------------------------------------------------------------------------- code, files, variables


def variables(*, here: bool) -> tuple[dict[str, str], list[str]]:
    """Return the environment variables that are sent with the job, including credentials, and notes about those left out.

    Args:
        here: True if the cluster consists of this machine only; then no variable is left out and nothing is checked.

    Raises:
        UserError: the object store listens on the loopback address, where the cluster cannot reach it.
    """
    if here:
        return forwarded_environment(), []
    found = {name: value for name, value in forwarded_environment().items() if name not in _OF_THIS_MACHINE}
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"):
        if _is_loopback(urlsplit(found.get(name, "")).hostname or ""):
            raise UserError(
                f"{name} is {found[name]}, which only this machine reaches; set it to an address that the cluster "
                "reaches, or give --no-credentials if its machines have their own"
            )
    left = sorted(set(forwarded_environment()) - set(found))
    notes = [f"{', '.join(left)}: names what is on this machine, so the job does not get it"] if left else []
    return found, notes


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def stage(folder: Path, files: dict[str, Path], *, code: bool, own: Path | None) -> None:
    """Copy the content of a job's working folder to ``folder``.

    Args:
        folder: empty folder.
        files: files to send, see `Job.files`.
        code: include this installation of vilseg; otherwise the job uses the cluster's own.
        own: folder with the user's modules and files; None for none.

    Raises:
        StorageError: ``own`` is not a folder or is too large to be sent.
    """
    if own is not None:
        if not own.is_dir():
            raise StorageError(f"--working-dir {own} is no folder")
        _check_size(own)
        shutil.copytree(own, folder, ignore=_ignore, ignore_dangling_symlinks=True, dirs_exist_ok=True)
    if code:
        root = Path(__file__).parents[2]
        for package in PACKAGES:
            if (root / package / "__init__.py").is_file():
                ignore = shutil.ignore_patterns("__pycache__", ".*")
                shutil.copytree(root / package, folder / package, ignore=ignore, dirs_exist_ok=True)
        if (root / "configs" / "demo.yaml").is_file():
            shutil.copytree(root / "configs", folder / "configs", dirs_exist_ok=True)
    for name, path in files.items():
        (folder / name).parent.mkdir(parents=True)
        shutil.copyfile(path, folder / name)


def _ignore(folder: str, names: list[str]) -> set[str]:
    if "pyvenv.cfg" in names:  # a virtual environment under any name
        return set(names)
    return {name for name in names if any(fnmatch.fnmatch(name.lower(), pattern) for pattern in _LEFT_OUT)}


def _check_size(folder: Path) -> None:
    total = 0
    for parent, folders, names in os.walk(folder):
        left_out = _ignore(parent, [*folders, *names])
        folders[:] = [name for name in folders if name not in left_out]
        paths = [Path(parent, name) for name in names if name not in left_out]
        total += sum(path.stat().st_size for path in paths if path.is_file())
        if total > _MOST_BYTES:
            raise StorageError(
                f"--working-dir {folder} holds more than {_MOST_BYTES // 1_000_000} MB; "
                "give a folder of code alone, and data by s3:// URIs"
            )
