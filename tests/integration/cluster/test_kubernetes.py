"""The manifests of cluster/kubernetes: rendered by kubectl, held against KubeRay's schemas and against this code."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.integration.cluster import commands, rules
from tests.integration.cluster.conftest import KUBERNETES, Render
from tests.integration.cluster.rules import Object, cluster_of

KINDS = {"cluster": "RayCluster", "train": "RayJob", "tune": "RayJob", "segment": "RayJob", "serve": "RayService"}
PLACES = [f"{size}/{purpose}" for size in ("gpu", "small") for purpose in KINDS]


def only(objects: list[Object]) -> Object:
    """The one object of KubeRay's."""
    (one,) = rules.kuberay(objects)
    return one


def test_no_kustomization_is_left_out() -> None:
    found = {str(file.parent.relative_to(KUBERNETES)) for file in KUBERNETES.rglob("kustomization.yaml")}
    assert {place for place in found if not place.startswith(("base", "components/"))} == set(PLACES)


@pytest.mark.parametrize("place", PLACES)
def test_a_kustomization_renders_one_object_that_a_cluster_takes(render: Render, place: str) -> None:
    objects = render(place)
    assert only(objects)["kind"] == KINDS[place.split("/")[1]]
    assert rules.problems(objects) == []


@pytest.mark.parametrize("place", PLACES)
def test_what_a_manifest_starts_is_what_this_code_has(render: Render, place: str) -> None:
    if place.endswith("tune") and "tune" not in commands.verbs():
        pytest.skip("there is no verb 'tune' yet")
    assert commands.problems(render(place)) == []


@pytest.mark.parametrize("purpose", [purpose for purpose, kind in KINDS.items() if kind == "RayJob"])
def test_a_job_runs_the_verb_of_its_name(render: Render, purpose: str) -> None:
    for size in ("gpu", "small"):
        job = only(render(f"{size}/{purpose}"))
        assert job["metadata"]["name"] == f"vilseg-{purpose}"
        assert job["spec"]["entrypoint"].split()[:2] == ["vilseg", purpose]


def test_small_asks_for_no_gpu_and_gpu_does(render: Render) -> None:
    for purpose in KINDS:
        assert "nvidia.com/gpu" not in str(only(render(f"small/{purpose}")))
        assert "nvidia.com/gpu" in box(render(f"gpu/{purpose}"))["resources"]["limits"]
        assert worker(render(f"gpu/{purpose}"))["template"]["spec"]["tolerations"][0]["key"] == "nvidia.com/gpu"


def test_the_pods_are_the_same_whatever_they_are_for(render: Render) -> None:
    """They are written once: a job's machines differ from the cluster's by its files alone."""

    def without_files(one: Object) -> Object:
        cluster = copy.deepcopy(cluster_of(one))
        for _, pod in rules.groups(cluster):
            pod["volumes"] = pod["containers"][0]["volumeMounts"] = []
        return cluster

    for purpose in ("train", "tune", "segment"):
        assert without_files(only(render(f"small/{purpose}"))) == without_files(only(render("small/cluster")))


def test_another_configuration_makes_another_name(render: Render) -> None:
    """A ConfigMap that changed under its old name would be read by some pods and not by others."""
    names = {
        one["metadata"]["name"]
        for place in ("gpu/train", "small/train")
        for one in render(place)
        if one["kind"] == "ConfigMap" and "run.yaml" in one["data"]
    }
    assert len(names) == 2
    assert all(re.fullmatch(r"vilseg-job-[a-z0-9]{10}", name) for name in names)


def test_the_five_can_be_in_one_namespace(render: Render) -> None:
    """KubeRay calls the head's service by the object's name, whatever its kind."""
    assert len({only(render(f"gpu/{purpose}"))["metadata"]["name"] for purpose in KINDS}) == len(KINDS)


def test_the_overlay_of_the_documentation(render: Render, tmp_path: Path) -> None:
    text = (KUBERNETES.parents[1] / "docs" / "kubernetes.md").read_text()
    (overlay,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    # Paths of bases are relative, and the test's folder lies elsewhere than a user's.
    ours = Path(*[".."] * (len(tmp_path.parts) - 1), *KUBERNETES.parts[1:])
    (tmp_path / "kustomization.yaml").write_text(overlay.replace("../vilseg/cluster/kubernetes", str(ours)))
    (tmp_path / "run.yaml").write_text(
        "data: {source: s3://shop/pairs}\ntrainer: {storage: s3://shop/runs, workers: 4}\n"
    )
    objects = render(tmp_path)
    job = only(objects)
    assert rules.problems(objects) + commands.problems(objects) == []
    assert {part["image"] for _, part in rules.containers(job)} == {"registry.shop.example/vilseg:2"}
    assert commands.parse(job["spec"]["entrypoint"])[1]["name"] == "shop"
    (store,) = [one for one in objects if "AWS_REGION" in one.get("data", {})]
    assert store["data"]["AWS_ENDPOINT_URL_S3"] == "https://s3.shop.example"
    assert {one["metadata"]["namespace"] for one in objects} == {"shop"}


# ------------------------------------------------------------------------------- what is broken is seen to be broken

Break = Callable[[list[Object]], Any]


def head(objects: list[Object]) -> Object:
    return cluster_of(only(objects))["headGroupSpec"]["template"]["spec"]


def worker(objects: list[Object]) -> Object:
    return cluster_of(only(objects))["workerGroupSpecs"][0]


def box(objects: list[Object]) -> Object:
    return worker(objects)["template"]["spec"]["containers"][0]


def submitter(objects: list[Object]) -> Object:
    return only(objects)["spec"]["submitterPodTemplate"]["spec"]


def variable(name: str, value: str) -> Break:
    return lambda objects: box(objects)["env"].append({"name": name, "value": value})


def config(**data: str) -> Break:
    return lambda objects: next(one for one in objects if "AWS_REGION" in one.get("data", {}))["data"].update(data)


CLUSTER_BREAKS: list[tuple[str, Break, str]] = [
    ("a field that there is not", lambda o: only(o)["spec"].update(replica=1), "Additional properties"),
    ("a field of a pod that there is not", lambda o: head(o).update(volume=[]), "Additional properties"),
    ("text for a number", lambda o: worker(o).update(maxReplicas="many"), "is not of type 'integer'"),
    ("no quantity", lambda o: box(o)["resources"]["limits"].update(memory="32 GB"), "schemas"),
    ("a mode that there is not", lambda o: cluster_of(only(o))["authOptions"].update(mode="password"), "is not one of"),
    ("a version that there is not", lambda o: only(o).update(apiVersion="ray.io/v2"), "is no kind of KubeRay's"),
    ("a head left out", lambda o: cluster_of(only(o)).pop("headGroupSpec"), "'headGroupSpec' is a required property"),
    ("capitals in a name", lambda o: only(o)["metadata"].update(name="ViLSeg"), "RFC 1035"),
    ("too long a name", lambda o: only(o)["metadata"].update(name="v" * 48), "at most 47"),
    ("a container's name", lambda o: box(o).update(name="ray_worker"), "RFC 1123"),
    ("an object twice", lambda o: o.append(copy.deepcopy(o[0])), "is there twice"),
    ("an image without a tag", lambda o: box(o).update(image="registry.example.com/vilseg"), "tag or digest"),
    ("an image of no registry", lambda o: box(o).update(image="vilseg"), "tag or digest"),
    ("the latest image", lambda o: box(o).update(image="registry.example.com/vilseg:latest"), "'latest'"),
    ("no limits", lambda o: box(o)["resources"].pop("limits"), "requests and limits of cpu"),
    ("more requested than allowed", lambda o: box(o)["resources"]["requests"].update(cpu="9"), "than the limit"),
    (
        "half a GPU",
        lambda o: [r.update({"nvidia.com/gpu": "500m"}) for r in box(o)["resources"].values()],
        "goes whole",
    ),
    ("a GPU requested alone", lambda o: box(o)["resources"]["limits"].pop("nvidia.com/gpu"), "goes whole"),
    ("root", lambda o: head(o)["securityContext"].update(runAsUser=0), "runAsNonRoot and a number"),
    ("perhaps root", lambda o: head(o)["securityContext"].pop("runAsNonRoot"), "runAsNonRoot and a number"),
    ("privileges", lambda o: box(o)["securityContext"].update(privileged=True), "allowPrivilegeEscalation"),
    ("capabilities", lambda o: box(o)["securityContext"].pop("capabilities"), "capabilities are to be dropped"),
    (
        "the autoscaler's privileges",
        lambda o: cluster_of(only(o))["autoscalerOptions"].pop("securityContext"),
        "autoscaler:",
    ),
    (
        "the submitter's privileges",
        lambda o: submitter(o).pop("securityContext"),
        "submitter:",
    ),
    ("the host's network", lambda o: head(o).update(hostNetwork=True), "hostNetwork"),
    ("the host's files", lambda o: head(o)["volumes"].append({"name": "h", "hostPath": {"path": "/"}}), "hostPath"),
    ("a key as it is", variable("AWS_SECRET_ACCESS_KEY", "x"), "must come by a secretKeyRef"),
    ("a token as it is", variable("RAY_AUTH_TOKEN", "x"), "must come by a secretKeyRef"),
    ("a key in a ConfigMap", config(AWS_SECRET_ACCESS_KEY="x"), "belongs into a Secret"),
    ("a key that shows by its letters", config(NOTE="AKIAIOSFODNN7EXAMPLE"), "looks like a secret"),
    ("an API key", config(NOTE="vs_" + "x" * 43), "looks like a secret"),
    ("the hash of an API key", config(KEYS="anna:" + "0" * 64), "looks like a secret"),
    ("a Secret", lambda o: o.append({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "s"}}), "is no kind"),
    ("a ConfigMap that is not there", lambda o: o.pop(0), "there is no ConfigMap"),
    ("a volume that is not there", lambda o: head(o).update(volumes=[]), "there is no volume"),
    ("no token", lambda o: cluster_of(only(o)).pop("authOptions"), "authOptions.mode: token is needed"),
    ("authentication off", lambda o: cluster_of(only(o))["authOptions"].update(mode="disabled"), "authOptions.mode"),
    ("another Ray", lambda o: cluster_of(only(o)).update(rayVersion="2.59.0"), "but requirements.lock has"),
    ("no autoscaling", lambda o: cluster_of(only(o)).update(enableInTreeAutoscaling=False), "enableInTreeAutoscaling"),
    ("more at least than at most", lambda o: worker(o).update(maxReplicas=1), "out of order"),
    ("restarts", lambda o: head(o).update(restartPolicy="Always"), "restartPolicy must be Never"),
    (
        "a cluster that stays for a time",
        lambda o: only(o)["spec"].update(shutdownAfterJobFinishes=False),
        "without shutdown",
    ),
]


@pytest.mark.parametrize(
    ("ruin", "said"), [case[1:] for case in CLUSTER_BREAKS], ids=[case[0] for case in CLUSTER_BREAKS]
)
def test_the_rules_see_what_a_cluster_would_refuse(render: Render, ruin: Break, said: str) -> None:
    objects = render("gpu/train")
    ruin(objects)
    found = rules.problems(objects)
    assert any(said in sentence for sentence in found) or (said == "schemas" and found), found


def entry(command: str) -> Break:
    return lambda objects: only(objects)["spec"].update(entrypoint=command)


def run_yaml(**keys: Any) -> Break:
    import yaml

    def change(objects: list[Object]) -> None:
        data = next(one for one in objects if "run.yaml" in one.get("data", {}))["data"]
        tree = yaml.safe_load(data["run.yaml"])
        for key, value in keys.items():
            part, _, name = key.partition("__")
            tree[part] = {**tree.get(part, {}), name: value}
        data["run.yaml"] = yaml.safe_dump(tree)

    return change


TRAIN = "vilseg train --config /etc/vilseg/run.yaml --name first --address auto"
JOB_BREAKS: list[tuple[str, Break, str]] = [
    ("no verb", entry("vilseg trian --config /etc/vilseg/run.yaml --address auto"), "No such command 'trian'"),
    ("another program", entry("python train.py"), "is not the vilseg command"),
    ("no such option", entry(f"{TRAIN} --epochs 3"), "No such option"),
    ("a value left out", entry("vilseg train --name first --address auto"), "Missing parameter: config"),
    ("no such key", entry(f"{TRAIN} trainer.worker=2"), "did you mean 'trainer.workers'"),
    ("a file that is not there", entry(TRAIN.replace("run.yaml", "other.yaml")), "which no ConfigMap puts there"),
    ("a Ray of its own", entry(TRAIN.replace(" --address auto", "")), "needs --address auto"),
    ("a shell's letters", entry(f"{TRAIN} && echo $HOME"), "letters that a shell reads"),
    ("a key of the file", run_yaml(trainer__wokers=4), "did you mean 'trainer.workers'"),
    ("a place on one machine", run_yaml(trainer__storage="runs"), "which other machines do not have"),
    ("no pairs", run_yaml(data__source=None), "which other machines do not have"),
    ("more workers than GPUs", run_yaml(trainer__workers=8), "but there are 4 GPUs"),
    ("a batch that cannot be shared", run_yaml(trainer__batch_size=255), "cannot be shared evenly"),
    ("fewer machines", lambda o: worker(o).update(replicas=2, minReplicas=2), "but there are 2 GPUs"),
]


@pytest.mark.parametrize(("ruin", "said"), [case[1:] for case in JOB_BREAKS], ids=[case[0] for case in JOB_BREAKS])
def test_the_rules_see_a_job_that_this_code_would_refuse(render: Render, ruin: Break, said: str) -> None:
    objects = render("gpu/train")
    ruin(objects)
    assert any(said in sentence for sentence in commands.problems(objects)), commands.problems(objects)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("search: random", "serach: random", "did you mean 'search'"),
        ("model.clusters", "model.cluster", "did you mean 'model.clusters'"),
        ("dataset: folder", "objective: nouns # folder", "held_out"),
    ],
)
def test_the_rules_see_a_sweep_that_this_code_would_refuse(render: Render, old: str, new: str, said: str) -> None:
    if "tune" not in commands.verbs():
        pytest.skip("there is no verb 'tune' yet")
    objects = render("gpu/tune")
    data = next(one for one in objects if "space.yaml" in one.get("data", {}))["data"]
    assert old in data["space.yaml"]
    data["space.yaml"] = data["space.yaml"].replace(old, new)
    assert any(said in sentence for sentence in commands.problems(objects)), commands.problems(objects)


def serving(old: str, new: str) -> Break:
    def change(objects: list[Object]) -> None:
        spec = only(objects)["spec"]
        assert old in spec["serveConfigV2"]
        spec["serveConfigV2"] = spec["serveConfigV2"].replace(old, new)

    return change


SERVE_BREAKS: list[tuple[str, Break, str]] = [
    ("a key that Serve has not", serving("route_prefix", "prefix"), "that Serve passes over: prefix"),
    ("a key that we have not", serving("minimum:", "minimal:"), "minimal"),
    ("no application", serving("serve.deployment:build", "serve.deployment:make"), "is not there"),
    ("no such deployment", serving("name: ingress", "name: entrance"), "there is no deployment 'entrance'"),
    ("loopback alone", serving("0.0.0.0", "127.0.0.1"), "no other pod reaches it"),
    ("no keys", serving("keys: /etc/vilseg/keys/keys.txt", "page: true"), "has no args.keys"),
    ("keys elsewhere", serving("/etc/vilseg/keys/", "/etc/keys/"), "where no Secret is mounted"),
    ("another port", serving("port: 8000", "port: 8001"), "no port 'serve' 8001"),
    ("one entrance", serving("EveryNode", "HeadOnly"), "proxy_location must be EveryNode"),
    ("more replicas than room", serving("maximum: 8", "maximum: 9"), "at most 8 find room"),
    ("no keys on workers", lambda o: worker(o)["template"]["spec"].update(volumes=[]), "gpu: args.keys"),
    ("slow threads", lambda o: box(o).update(env=[]), "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD is to be 0"),
]


@pytest.mark.parametrize(("ruin", "said"), [case[1:] for case in SERVE_BREAKS], ids=[case[0] for case in SERVE_BREAKS])
def test_the_rules_see_a_service_that_would_not_come_up(render: Render, ruin: Break, said: str) -> None:
    objects = render("gpu/serve")
    ruin(objects)
    assert any(said in sentence for sentence in commands.problems(objects)), commands.problems(objects)
