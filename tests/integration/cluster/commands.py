"""Checks of manifests against this code: verbs and their arguments, configurations, the served application."""

from __future__ import annotations

import re
import shlex
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
import yaml

from cli import app as command_line
from cluster.ray_session import Session
from tests.integration.cluster.rules import Object, amount, cluster_of, groups
from vilseg.config import RunConfig
from vilseg.errors import UserError

FILES_AT = "/etc/vilseg"
_PLAIN = re.compile(r"[\w ./:=,@-]+")
"""Two shells read an entry point, the submitter's and the job's: what they leave alone means the same to both."""


def verbs() -> set[str]:
    return set(typer.main.get_command(command_line.app).commands)  # type: ignore[attr-defined]


def parse(command: str) -> tuple[str, dict[str, Any]]:
    """Verb and arguments as the command line takes them, without running it.

    Raises:
        typer.TyperException: it does not take them.
    """
    program, *arguments = shlex.split(command)
    if program != "vilseg":
        raise typer.TyperException(f"'{program}' is not the vilseg command")
    app: Any = typer.main.get_command(command_line.app)
    context = app.make_context("vilseg", arguments[:1])
    verb, found, rest = app.resolve_command(context, arguments)
    return verb, found.make_context(verb, list(rest), parent=context).params


def at_start(cluster: Object) -> Session:
    """Resources that Ray reports at the start of a job: every group has its ``replicas``."""
    (_, head), *workers = groups(cluster)
    sizes = [(cluster["headGroupSpec"]["rayStartParams"], 1, head)]
    for group, (_, pod) in zip(cluster["workerGroupSpecs"], workers, strict=True):
        sizes.append((group["rayStartParams"], group["replicas"], pod))
    cpus = gpus = 0
    for params, count, pod in sizes:
        limits = pod["containers"][0]["resources"]["limits"]
        cpus += count * int(params.get("num-cpus", amount(limits["cpu"])))
        gpus += count * int(amount(limits.get("nvidia.com/gpu", 0)) or 0)
    return Session(cpus, gpus)


def _mounted(objects: list[Object], cluster: Object) -> dict[str, str]:
    """Contents of the files under FILES_AT on the head, by path."""
    pod = groups(cluster)[0][1]
    maps = {one["metadata"]["name"]: one["data"] for one in objects if one["kind"] == "ConfigMap"}
    at = {mount["name"]: mount["mountPath"] for mount in pod["containers"][0].get("volumeMounts", [])}
    return {
        f"{at[volume['name']]}/{name}": text
        for volume in pod.get("volumes", [])
        if "configMap" in volume and volume["name"] in at
        for name, text in maps.get(volume["configMap"]["name"], {}).items()
    }


def entry_points(objects: list[Object]) -> Iterator[str]:
    for one in objects:
        if one["kind"] != "RayJob":
            continue
        command, cluster = one["spec"].get("entrypoint", ""), cluster_of(one)
        if not _PLAIN.fullmatch(command):
            yield f"the entry point has letters that a shell reads: {command}"
            continue
        try:
            verb, arguments = parse(command)
        except typer.TyperException as error:
            yield f"the command line refuses '{command}': {error}"
            continue
        if arguments.get("address") != "auto":
            yield f"'{command}' needs --address auto, or it starts a Ray of its own on the head"
        files = _mounted(objects, cluster)
        with tempfile.TemporaryDirectory() as folder:
            for path in [word for word in shlex.split(command) if word.startswith(f"{FILES_AT}/")]:
                if path not in files:
                    yield f"'{command}' names {path}, which no ConfigMap puts there"
                else:
                    Path(folder, Path(path).name).write_text(files[path])
            here = {key: str(value).replace(FILES_AT, folder) for key, value in arguments.items() if value}
            try:
                yield from _job(verb, here, arguments, cluster)
            except UserError as error:
                yield f"'{command}': {str(error).replace(folder, FILES_AT)}"


def _job(verb: str, here: dict[str, str], arguments: dict[str, Any], cluster: Object) -> Iterator[str]:
    if verb in ("train", "tune"):
        config = RunConfig.load(here["config"], arguments.get("overrides") or [])
        for key, uri in (("data.source", config.data.source), ("trainer.storage", config.trainer.storage)):
            if not str(uri).startswith("s3://"):
                yield f"{key} is {uri}, which other machines do not have"
        session = at_start(cluster)
        config.trainer.check_even_split()
        session.worker_resources(config.trainer.workers)  # refuses more workers than there are when the job begins
    if verb == "tune":
        from tune.search_space import SearchSpace

        SearchSpace.load(here["space"]).check(config)
    if verb == "segment":
        from vilseg.text.vocabulary import Vocabulary

        Vocabulary.parse(here["classes"])
        for uri in (*arguments["inputs"], here["model"], here["out"]):
            if not uri.startswith("s3://"):
                yield f"{uri} is a place that other machines do not have"


def served(objects: list[Object]) -> Iterator[str]:
    from pydantic import ValidationError
    from ray.serve.schema import ServeDeploySchema

    from serve.config import ServeConfig
    from serve.launch import RAY_SERVE_ENVIRONMENT
    from serve.middleware import is_loopback

    for one in objects:
        if one["kind"] != "RayService":
            continue
        tree = yaml.safe_load(one["spec"].get("serveConfigV2", "")) or {}
        try:
            deployment = ServeDeploySchema.model_validate(tree)
            (application,) = deployment.applications
            config = ServeConfig.model_validate(application.args)
        except ValidationError as error:
            yield f"serveConfigV2: {error.errors()[0]['loc']}: {error.errors()[0]['msg']}"
            continue
        cluster = cluster_of(one)
        for key in _unknown(tree, deployment):
            yield f"serveConfigV2 has a key that Serve passes over: {key}"
        yield from _application(application, config)
        if is_loopback(deployment.http_options.host):
            yield f"serveConfigV2 listens on {deployment.http_options.host}, where no other pod reaches it"
        elif config.keys is None:
            yield "serveConfigV2 has no args.keys, so whoever asks from another machine is refused"
        head = groups(cluster)[0][1]["containers"][0]
        if {"name": "serve", "containerPort": deployment.http_options.port} not in head["ports"]:
            yield f"the head has no port 'serve' {deployment.http_options.port}, so KubeRay makes no service for it"
        if deployment.proxy_location != "EveryNode":
            yield "proxy_location must be EveryNode: KubeRay's probes ask the proxy of every worker"
        for name, pod in groups(cluster):
            secret_at = {
                mount["mountPath"]
                for mount in pod["containers"][0].get("volumeMounts", [])
                for volume in pod["volumes"]
                if volume["name"] == mount["name"] and "secret" in volume
            }
            if config.keys and not any(config.keys.startswith(f"{place}/") for place in secret_at):
                yield f"{name}: args.keys is {config.keys}, where no Secret is mounted"
            variables = {entry["name"]: entry.get("value") for entry in pod["containers"][0].get("env", [])}
            for key, value in RAY_SERVE_ENVIRONMENT.items():
                if variables.get(key) != value:
                    yield f"{name}: {key} is to be {value}, as 'vilseg serve' has it"
        yield from _room(cluster, config)


def _unknown(tree: Any, model: Any) -> Iterator[str]:
    """Keys of a mapping that its pydantic model does not have: Serve's own passes them over."""
    for key, value in tree.items():
        if key not in type(model).model_fields:
            yield key
            continue
        parsed = getattr(model, key)
        pairs = zip(value, parsed, strict=True) if isinstance(parsed, list) else [(value, parsed)]
        for part, sub in pairs:
            if hasattr(sub, "model_fields"):
                yield from _unknown(part, sub)


def _application(application: Any, config: Any) -> Iterator[str]:
    """Check that the import path builds an application whose deployments are those that the file names."""
    from importlib import import_module

    module, _, name = application.import_path.partition(":")
    try:
        build = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        yield f"import_path {application.import_path} is not there: {error}"
        return
    built = build(config)
    there = {built._bound_deployment.name}
    there |= {
        part._bound_deployment.name for part in built._bound_deployment.init_args if hasattr(part, "_bound_deployment")
    }
    for entry in application.deployments:
        if entry.name not in there:
            yield f"there is no deployment '{entry.name}'; there are {', '.join(sorted(there))}"


def _room(cluster: Object, config: Any) -> Iterator[str]:
    """Check that every replica that may be started fits on a machine."""
    want, room = config.replicas, 0
    for group, (_, pod) in zip(cluster["workerGroupSpecs"], groups(cluster)[1:], strict=True):
        limits = pod["containers"][0]["resources"]["limits"]
        fits = [float(amount(limits["cpu"]) or 0) // want.cpus] if want.cpus else []
        fits += [float(amount(limits.get("nvidia.com/gpu", 0)) or 0) // want.gpus] if want.gpus else []
        room += group["maxReplicas"] * int(min(fits, default=want.maximum))
    if room < want.maximum:
        yield f"replicas.maximum is {want.maximum}, but at most {room} find room on all machines"


def problems(objects: list[Object]) -> list[str]:
    """All that is wrong."""
    return [*entry_points(objects), *served(objects)]
