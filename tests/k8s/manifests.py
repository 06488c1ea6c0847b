"""What the manifests render to, and the parts of it that tests look at."""

import subprocess
import sys
from collections.abc import Iterator
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml

ROOT = Path(__file__).parents[2]
OVERLAYS = sorted(path.name for path in (ROOT / "k8s" / "overlays").iterdir())
CLUSTER_FIELD = {"RayJob": "rayClusterSpec", "RayService": "rayClusterConfig"}

Manifest = dict[str, Any]


class Pod(NamedTuple):
    """A pod template. `role`: head, worker, submitter or none of Ray; `name` says where it stands."""

    name: str
    role: str
    template: dict[str, Any]

    @property
    def spec(self) -> dict[str, Any]:
        spec: dict[str, Any] = self.template["spec"]
        return spec

    @property
    def labels(self) -> dict[str, str]:
        labels: dict[str, str] = self.template["metadata"]["labels"]
        return labels

    @property
    def containers(self) -> list[dict[str, Any]]:
        return [*self.spec.get("initContainers", []), *self.spec["containers"]]


@cache
def render(overlay: str) -> list[Manifest]:
    """The objects of an overlay, as `kubectl kustomize` prints them; all callers share them."""
    kubectl = [str(Path(sys.executable).with_name("kubectl")), "kustomize", f"k8s/overlays/{overlay}"]
    done = subprocess.run(kubectl, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return list(yaml.load_all(done.stdout, yaml.CSafeLoader))


def find(overlay: str, kind: str, name: str) -> Manifest:
    """A copy of one object, which the caller may change."""
    (found,) = [each for each in render(overlay) if (each["kind"], each["metadata"]["name"]) == (kind, name)]
    return deepcopy(found)


def ray_objects(overlay: str) -> list[Manifest]:
    return [each for each in render(overlay) if each["apiVersion"].startswith("ray.io/")]


def cluster_of(manifest: Manifest) -> dict[str, Any]:
    """The specification of the Ray cluster inside a RayCluster, RayJob or RayService."""
    spec: dict[str, Any] = manifest["spec"]
    field = CLUSTER_FIELD.get(manifest["kind"])
    return spec[field] if field else spec


def groups(cluster: dict[str, Any]) -> list[dict[str, Any]]:
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def pods_of(manifest: Manifest) -> Iterator[Pod]:
    """Every pod template that an object holds."""
    where = f"{manifest['kind']} {manifest['metadata']['name']}"
    if manifest["apiVersion"].startswith("ray.io/"):
        for group in groups(cluster_of(manifest)):
            role = "worker" if "groupName" in group else "head"
            yield Pod(f"{where}: {group.get('groupName', 'head')}", role, group["template"])
        if manifest["kind"] == "RayJob":
            yield Pod(f"{where}: submitter", "submitter", manifest["spec"]["submitterPodTemplate"])
    elif manifest["kind"] in ("Deployment", "StatefulSet"):
        yield Pod(where, "", manifest["spec"]["template"])
    elif manifest["kind"] == "CronJob":
        yield Pod(where, "", manifest["spec"]["jobTemplate"]["spec"]["template"])


def pods(overlay: str) -> list[Pod]:
    return [pod for manifest in render(overlay) for pod in pods_of(manifest)]


def with_value(manifest: Manifest, path: str, value: Any) -> Manifest:
    """A copy with another value at `path` (`spec.workerGroupSpecs.0.groupName`); None removes the field."""
    changed = deepcopy(manifest)
    *parents, last = path.split(".")
    place: Any = changed
    for part in parents:
        place = place[int(part)] if isinstance(place, list) else place.setdefault(part, {})
    if value is None:
        del place[last]
    else:
        place[last] = value
    return changed
