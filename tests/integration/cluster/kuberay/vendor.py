"""Make ``crds.json.gz`` of KubeRay's custom resource definitions; README.md says how to call it."""

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import yaml

KINDS = {"rayclusters": "RayCluster", "rayjobs": "RayJob", "rayservices": "RayService"}


def without_prose(schema: Any) -> Any:
    """A schema without descriptions (nine tenths of it) and without CEL rules, which nothing here evaluates."""
    if isinstance(schema, list):
        return [without_prose(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: {name: without_prose(part) for name, part in value.items()}
        if key == "properties"
        else without_prose(value)
        for key, value in schema.items()
        if key not in ("description", "x-kubernetes-validations")
    }


def main(folder: Path) -> None:
    schemas = {}
    for plural, kind in KINDS.items():
        definition = yaml.safe_load((folder / f"ray.io_{plural}.yaml").read_text())
        (version,) = [one for one in definition["spec"]["versions"] if one["name"] == "v1"]
        schema = without_prose(version["schema"]["openAPIV3Schema"])
        del schema["properties"]["status"]
        schemas[kind] = schema
    text = json.dumps(schemas, separators=(",", ":"), sort_keys=True)
    (Path(__file__).parent / "crds.json.gz").write_bytes(gzip.compress(text.encode(), mtime=0))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
