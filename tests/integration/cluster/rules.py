"""Rules of a Kubernetes cluster with KubeRay, and our own rules for manifests; no cluster is needed.

Every rule takes the objects that one kustomization renders to and yields a sentence for each thing that is wrong.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterator
from decimal import Decimal
from functools import cache
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator

Object = dict[str, Any]
CLUSTER_AT = {"RayCluster": ("spec",), "RayJob": ("spec", "rayClusterSpec"), "RayService": ("spec", "rayClusterConfig")}
LONGEST_NAME = {"RayCluster": 53, "RayJob": 47, "RayService": 47}
"""KubeRay makes names of pods and services from them (its controllers/ray/utils/constant.go)."""
_LABEL = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_IMAGE = re.compile(
    r"[a-z0-9.-]+(:\d+)?(/[a-z0-9._-]+)+(:(?P<tag>[A-Za-z0-9_][A-Za-z0-9._-]{0,127})|@sha256:[0-9a-f]{64})"
)
_SECRET_NAME = re.compile(r"SECRET|TOKEN|PASSWORD|ACCESS_KEY|API_KEY|PRIVATE")
_SECRET = re.compile(
    r"\b(AKIA|ASIA)[A-Z0-9]{16}\b|\bvs_[\w-]{20,}|PRIVATE KEY|:[0-9a-f]{64}\b|\b[\w-]*token[\"']?[:=] *[\w-]{8,}"
)
_SUFFIX = {
    "": 1,
    "m": Decimal("0.001"),
    "k": 10**3,
    "M": 10**6,
    "G": 10**9,
    "Ki": 2**10,
    "Mi": 2**20,
    "Gi": 2**30,
    "Ti": 2**40,
}
_QUANTITY = re.compile(r"(\d+(?:\.\d+)?)(m|k|M|G|Ki|Mi|Gi|Ti)?")


def cluster_of(one: Object) -> Object:
    """The cluster's spec inside a RayCluster, RayJob or RayService."""
    for key in CLUSTER_AT[one["kind"]]:
        one = one.get(key, {})
    return one


def kuberay(objects: list[Object]) -> list[Object]:
    return [one for one in objects if one["kind"] in CLUSTER_AT]


def groups(cluster: Object) -> list[tuple[str, Object]]:
    """Name and pod spec of the head and of every group of workers."""
    named = [("head", cluster["headGroupSpec"])]
    named += [(group["groupName"], group) for group in cluster.get("workerGroupSpecs", [])]
    return [(name, group["template"]["spec"]) for name, group in named]


def pods(one: Object) -> list[tuple[str, Object]]:
    """Name and spec of every pod that an object describes."""
    found = groups(cluster_of(one))
    if "submitterPodTemplate" in one["spec"]:
        found.append(("submitter", one["spec"]["submitterPodTemplate"]["spec"]))
    return found


def containers(one: Object) -> list[tuple[str, Object]]:
    return [(f"{name}/{part['name']}", part) for name, pod in pods(one) for part in pod["containers"]]


def amount(quantity: Any) -> Decimal | None:
    """A Kubernetes quantity as a number; None where it is none."""
    match = _QUANTITY.fullmatch(str(quantity))
    return Decimal(match[1]) * _SUFFIX[match[2] or ""] if match else None


# ---------------------------------------------------------------------------------------------------------- schema


def _closed(schema: Any) -> Any:
    """The schema as the API server takes it with strict validation: unknown fields are refused."""
    if isinstance(schema, list):
        return [_closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: _closed(value) for key, value in schema.items()}
    if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        closed.setdefault("additionalProperties", False)
    return closed


@cache
def _validators() -> dict[str, Draft202012Validator]:
    packed = Path(__file__).parent / "kuberay" / "crds.json.gz"
    schemas = json.loads(gzip.decompress(packed.read_bytes()))
    return {kind: Draft202012Validator(_closed(schema)) for kind, schema in schemas.items()}


def schema(objects: list[Object]) -> Iterator[str]:
    for one in objects:
        kind, version = one["kind"], one["apiVersion"]
        if kind == "ConfigMap":
            if version != "v1" or not all(isinstance(value, str) for value in one.get("data", {}).values()):
                yield f"ConfigMap {one['metadata']['name']}: data must be text"
        elif kind not in _validators() or version != "ray.io/v1":
            yield f"{version} {kind} is no kind of KubeRay's or ours"
        else:
            for error in _validators()[kind].iter_errors(one):
                yield f"{kind} at {'.'.join(map(str, error.absolute_path))}: {error.message[-300:]}"


# ---------------------------------------------------------------------------------------------- rules of Kubernetes


def names(objects: list[Object]) -> Iterator[str]:
    seen = set()
    for one in objects:
        kind, name = one["kind"], one["metadata"]["name"]
        if (kind, name) in seen:
            yield f"{kind} {name} is there twice"
        seen.add((kind, name))
        for key in one["metadata"].keys() - {"name", "namespace", "labels", "annotations"}:
            yield f"{kind} {name}: metadata has an unknown field {key}"
        if kind not in LONGEST_NAME:
            if not _SUBDOMAIN.fullmatch(name) or len(name) > 253:
                yield f"{kind} '{name}' is no name of an object (RFC 1123)"
            continue
        if not _LABEL.fullmatch(name) or len(name) > LONGEST_NAME[kind]:
            yield f"{kind} '{name}' is no label of at most {LONGEST_NAME[kind]} letters (RFC 1035)"
        for pod_name, pod in pods(one):
            parts = [*pod["containers"], *pod.get("volumes", [])]
            parts += [port for part in pod["containers"] for port in part.get("ports", [])]
            for part in [{"name": pod_name}, *parts]:
                if not _LABEL.fullmatch(part["name"]) or len(part["name"]) > 63:
                    yield f"{kind} {name}: '{part['name']}' of {pod_name} is no label (RFC 1123)"


def images(objects: list[Object]) -> Iterator[str]:
    for one in kuberay(objects):
        for where, part in containers(one):
            match = _IMAGE.fullmatch(part.get("image", ""))
            if match is None:
                yield f"{where}: '{part.get('image')}' is no image of a registry with a tag or digest"
            elif match["tag"] == "latest":
                yield f"{where}: 'latest' names another image every day"


def resources(objects: list[Object]) -> Iterator[str]:
    for one in kuberay(objects):
        for where, part in containers(one):
            asked, most = (part.get("resources", {}).get(key, {}) for key in ("requests", "limits"))
            for kind in ("cpu", "memory"):
                if kind not in asked or kind not in most:
                    yield f"{where}: requests and limits of {kind} are needed"
            for kind in asked.keys() | most.keys():
                low, high = amount(asked.get(kind, 0)), amount(most.get(kind, "9999Ti"))
                if low is None or high is None:
                    yield f"{where}: a quantity of {kind} is none"
                elif low > high:
                    yield f"{where}: more {kind} is requested than the limit"
                elif "/" in kind and (low != high or low != int(low)):
                    yield f"{where}: {kind} goes whole, and as much of it is the limit as is requested"
                elif "gpu" in kind and kind != "nvidia.com/gpu":
                    yield f"{where}: {kind} is nothing that Ray knows as a GPU"


def security(objects: list[Object]) -> Iterator[str]:
    for one in kuberay(objects):
        for name, pod in pods(one):
            context = pod.get("securityContext", {})
            if context.get("runAsNonRoot") is not True or not context.get("runAsUser"):
                yield f"{name}: runAsNonRoot and a number as runAsUser are needed"
            if context.get("seccompProfile", {}).get("type") != "RuntimeDefault":
                yield f"{name}: seccompProfile RuntimeDefault is needed"
            for key in ("hostNetwork", "hostPID", "hostIPC"):
                if pod.get(key):
                    yield f"{name}: {key} is not wanted"
            if any("hostPath" in volume for volume in pod.get("volumes", [])):
                yield f"{name}: hostPath is not wanted"
        boxes = [(where, part.get("securityContext", {})) for where, part in containers(one)]
        boxes.append(("autoscaler", cluster_of(one).get("autoscalerOptions", {}).get("securityContext", {})))
        for where, context in boxes:
            if context.get("allowPrivilegeEscalation") is not False or context.get("privileged"):
                yield f"{where}: allowPrivilegeEscalation: false is needed"
            if context.get("capabilities", {}).get("drop") != ["ALL"]:
                yield f"{where}: all capabilities are to be dropped"


def secrets(objects: list[Object]) -> Iterator[str]:
    """By reference only: whatever looks like a key stands in no manifest."""
    for one in objects:
        if one["kind"] == "Secret":
            yield "a Secret is made by whoever has it, not by a manifest in a repository"
        found = _SECRET.search(json.dumps(one))
        if found:
            yield f"{one['kind']} {one['metadata']['name']} holds what looks like a secret: {found[0][:12]}…"
        if one["kind"] == "ConfigMap":
            for key in one.get("data", {}):
                if _SECRET_NAME.search(key):
                    yield f"ConfigMap {one['metadata']['name']}: {key} belongs into a Secret"
    for one in kuberay(objects):
        for where, part in containers(one):
            for variable in part.get("env", []):
                by_reference = "secretKeyRef" in variable.get("valueFrom", {})
                if _SECRET_NAME.search(variable["name"]) and not by_reference:
                    yield f"{where}: {variable['name']} must come by a secretKeyRef"


def references(objects: list[Object]) -> Iterator[str]:
    """ConfigMaps that are named are rendered too, and every mount has its volume."""
    there = {one["metadata"]["name"] for one in objects if one["kind"] == "ConfigMap"}
    for one in kuberay(objects):
        for name, pod in pods(one):
            volumes = {volume["name"]: volume for volume in pod.get("volumes", [])}
            wanted = [volume["configMap"]["name"] for volume in volumes.values() if "configMap" in volume]
            for part in pod["containers"]:
                wanted += [
                    source["configMapRef"]["name"] for source in part.get("envFrom", []) if "configMapRef" in source
                ]
                for mount in part.get("volumeMounts", []):
                    if mount["name"] not in volumes:
                        yield f"{name}: there is no volume {mount['name']}"
            for config in wanted:
                if config not in there:
                    yield f"{name}: there is no ConfigMap {config}"


# -------------------------------------------------------------------------------------------------- rules of KubeRay


def kuberay_rules(objects: list[Object]) -> Iterator[str]:
    """Problems that KubeRay's controllers report in an accepted object (controllers/ray/utils/validation.go)."""
    import ray

    for one in kuberay(objects):
        cluster = cluster_of(one)
        if cluster.get("authOptions", {}).get("mode") != "token":
            yield "authOptions.mode: token is needed, or anybody who reaches the head may run code"
        if cluster.get("rayVersion") != ray.__version__:
            yield f"rayVersion is {cluster.get('rayVersion')}, but requirements.lock has {ray.__version__}"
        if cluster.get("enableInTreeAutoscaling") is not True:
            yield "enableInTreeAutoscaling is needed for workers to come and go"
        for group in cluster.get("workerGroupSpecs", []):
            low, now, high = group["minReplicas"], group["replicas"], group["maxReplicas"]
            if not 0 <= low <= now <= high:
                yield f"{group['groupName']}: minReplicas {low}, replicas {now}, maxReplicas {high} are out of order"
            if group.get("resources") and group["rayStartParams"].keys() & {
                "num-cpus",
                "num-gpus",
                "memory",
                "resources",
            }:
                yield f"{group['groupName']}: resources are in rayStartParams already"
        for name, pod in groups(cluster):
            if pod.get("restartPolicy", "Never") != "Never":
                yield f"{name}: restartPolicy must be Never with the autoscaler v2"
        spec = one["spec"]
        if one["kind"] == "RayJob":
            if spec.get("ttlSecondsAfterFinished", 0) and not spec.get("shutdownAfterJobFinishes"):
                yield "ttlSecondsAfterFinished without shutdownAfterJobFinishes"
            if spec.get("backoffLimit", 0) < 0 or spec.get("ttlSecondsAfterFinished", 0) < 0:
                yield "backoffLimit and ttlSecondsAfterFinished may not be below 0"


CLUSTER_RULES = (schema, names, images, resources, security, secrets, references, kuberay_rules)


def problems(objects: list[Object]) -> list[str]:
    """All that is wrong; where the schema is broken that alone, since the other rules rely on it."""
    broken = list(schema(objects))
    return broken or [sentence for rule in CLUSTER_RULES[1:] for sentence in rule(objects)]
