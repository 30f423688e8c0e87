"""cluster/aws.yaml, as far as `ray up` goes without a cloud: Ray's own checks, its commands, and what EC2 takes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import yaml

from tests.integration.cluster.conftest import KUBERNETES, Render
from tests.integration.cluster.rules import secrets


@pytest.fixture
def tree() -> dict[str, Any]:
    return yaml.safe_load((KUBERNETES.parent / "aws.yaml").read_text())


def prepared(tree: dict[str, Any]) -> dict[str, Any]:
    """Configuration as `ray up` prepares it before it calls the cloud; raises what it raises."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(copy.deepcopy(tree))
    validate_config(config)
    return config


def refused_by_ec2(node_config: dict[str, Any]) -> str:
    """Problems of a machine under EC2's description of RunInstances, to which Ray passes it unchanged."""
    import botocore.session
    from botocore.validate import ParamValidator

    operation = botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances")
    shape = operation.input_shape
    assert shape is not None
    report = ParamValidator().validate({**node_config, "MinCount": 1, "MaxCount": 1}, shape)
    if report.has_errors():
        return report.generate_report()
    known = shape.members["InstanceType"].enum
    return "" if node_config["InstanceType"] in known else f"there is no {node_config['InstanceType']}"


def test_ray_takes_it(tree: dict[str, Any]) -> None:
    config = prepared(tree)
    assert config["head_node_type"] == "head"
    assert {
        name: (kind["min_workers"], kind["max_workers"]) for name, kind in config["available_node_types"].items()
    } == {
        "head": (0, 0),
        "gpu": (1, 8),
        "data": (1, 8),
    }


def test_ec2_takes_the_machines(tree: dict[str, Any]) -> None:
    for kind in tree["available_node_types"].values():
        assert refused_by_ec2(kind["node_config"]) == ""


@pytest.mark.parametrize(
    ("ruin", "said"),
    [
        (lambda tree: tree.update(max_worker=3), "Additional properties"),
        (lambda tree: tree.update(max_workers=1), "smaller than the sum of `min_workers`"),
        (lambda tree: tree.update(head_node_type="header"), "`head_node_type` must be one of"),
        (lambda tree: tree["provider"].update(type="amazon"), "amazon"),
        (lambda tree: tree["available_node_types"]["gpu"].update(max_workers="many"), "is not of type"),
        (lambda tree: tree["docker"].pop("container_name"), "Must provide a container & image name"),
    ],
)
def test_ray_refuses_what_is_broken(tree: dict[str, Any], ruin: Callable[[dict[str, Any]], Any], said: str) -> None:
    ruin(tree)
    with pytest.raises(Exception, match=said):  # jsonschema's error, ValueError or AssertionError
        prepared(tree)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"InstanceTypes": "g6.2xlarge"}, "Unknown parameter"),
        ({"InstanceType": "g6.2xlage"}, "there is no g6.2xlage"),
        ({"IamInstanceProfile": "vilseg-worker"}, "Invalid type"),
        ({"BlockDeviceMappings": [{"DeviceName": "/dev/sda1", "Ebs": {"Size": 150}}]}, "Unknown parameter"),
    ],
)
def test_ec2_refuses_what_is_broken(tree: dict[str, Any], change: dict[str, Any], said: str) -> None:
    assert said in refused_by_ec2({**tree["available_node_types"]["gpu"]["node_config"], **change})


def test_ray_start_takes_its_options(tree: dict[str, Any]) -> None:
    from ray.scripts.scripts import cli

    for command in (*tree["head_start_ray_commands"], *tree["worker_start_ray_commands"]):
        program, verb, *arguments = command.split()
        assert program == "ray"
        cli.commands[verb].make_context(verb, arguments)


def test_the_container_is_that_of_kubernetes_with_the_token_on(tree: dict[str, Any], render: Render) -> None:
    from ray.autoscaler._private.docker import docker_start_cmds

    docker = tree["docker"]
    command = docker_start_cmds(
        "ubuntu",
        docker["image"],
        tree["file_mounts"],
        docker["container_name"],
        docker["run_options"],
        tree["cluster_name"],
        "/home/ray",
        "docker",
    )
    (cluster,) = [one for one in render("gpu/cluster") if one["kind"] == "RayCluster"]
    assert cluster["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["image"] in command.split()
    assert "--env RAY_AUTH_MODE=token" in command
    assert ":/home/ray/.ray/auth_token" in command
    assert "--dashboard-host=127.0.0.1" in " ".join(tree["head_start_ray_commands"])


def test_it_holds_no_key(tree: dict[str, Any]) -> None:
    assert list(secrets([{"kind": "file", "metadata": {"name": "aws.yaml"}, **tree}])) == []
    for kind in tree["available_node_types"].values():
        assert "IamInstanceProfile" in kind["node_config"]
