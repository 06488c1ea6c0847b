"""What KubeRay's operator refuses, or silently leaves without effect, and no schema can say.

Source: `ray-operator/controllers/ray/utils/validation.go` of KubeRay 1.7 and its documentation.
"""

import re
from collections.abc import Iterator
from typing import Any

from tests.k8s.manifests import Manifest, cluster_of, groups

START_RESOURCES = {"num-cpus", "num-gpus", "memory", "resources"}
UPGRADES = {"NewCluster", "NewClusterWithIncrementalUpgrade", "None"}


def faults(manifest: Manifest, ray_version: str) -> Iterator[str]:
    """A sentence for everything that is wrong with a RayCluster, RayJob or RayService."""
    name = manifest["metadata"]["name"]
    if len(name) > 47 or not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
        yield "metadata.name: not a DNS label of at most 47 characters"
    yield from cluster_faults(cluster_of(manifest), ray_version)
    if manifest["kind"] == "RayJob":
        yield from job_faults(manifest["spec"])
    if manifest["kind"] == "RayService":
        yield from service_faults(manifest["spec"])


def cluster_faults(cluster: dict[str, Any], ray_version: str) -> Iterator[str]:
    if cluster.get("rayVersion") != ray_version:
        yield "rayVersion: not the one of requirements.lock"
    if cluster.get("authOptions") != {"mode": "token"}:
        yield "authOptions: not written out as token"
    scales = cluster.get("enableInTreeAutoscaling", False)
    if scales and cluster.get("autoscalerOptions", {}).get("version") != "v2":
        yield "autoscalerOptions.version: not v2"
    if not scales and "autoscalerOptions" in cluster:
        yield "autoscalerOptions: without effect, since nothing scales"
    head = cluster["headGroupSpec"]
    if head.get("rayStartParams", {}).get("num-cpus") != "0":
        yield "head: takes work (num-cpus is not 0)"
    if "nvidia.com/gpu" in head["template"]["spec"]["containers"][0]["resources"]["limits"]:
        yield "head: has a GPU"
    for group in groups(cluster):
        yield from group_faults(group, scales)
    if "gcsFaultToleranceOptions" in cluster:
        yield from fault_tolerance_faults(cluster)


def group_faults(group: dict[str, Any], scales: bool) -> Iterator[str]:
    name = group.get("groupName", "head")
    start, pod = group.get("rayStartParams", {}), group["template"]["spec"]
    if not all(isinstance(value, str) for value in start.values()):
        yield f"{name}: rayStartParams must be strings"
    if "labels" in start:
        yield f"{name}: labels belong into the group, not into rayStartParams"
    if group.get("resources") and START_RESOURCES & set(start):
        yield f"{name}: resources both in the group and in rayStartParams"
    if name != "head" and START_RESOURCES & set(start):
        yield f"{name}: resources both in the container and in rayStartParams"
    if scales and pod.get("restartPolicy") != "Never":
        yield f"{name}: the autoscaler needs restartPolicy Never"
    if scales and group.get("suspend"):
        yield f"{name}: suspended, though the cluster scales"
    if group.get("minReplicas", 0) > group.get("maxReplicas", 0):
        yield f"{name}: minReplicas above maxReplicas"
    resources = pod["containers"][0]["resources"]
    for kind in ("memory", "nvidia.com/gpu"):  # memory: /dev/shm is sized by it
        if resources["requests"].get(kind) != resources["limits"].get(kind):
            yield f"{name}: requests and limits differ in {kind}"


def fault_tolerance_faults(cluster: dict[str, Any]) -> Iterator[str]:
    options, head = cluster["gcsFaultToleranceOptions"], cluster["headGroupSpec"]
    set_by_hand = {each["name"] for each in head["template"]["spec"]["containers"][0].get("env", [])}
    if "secretKeyRef" not in options.get("redisPassword", {}).get("valueFrom", {}):
        yield "redisPassword: not from a Secret"
    if set_by_hand & {"RAY_REDIS_ADDRESS", "REDIS_PASSWORD", "REDIS_USERNAME"}:
        yield "head: sets Redis by environment too"
    if "redis-password" in head.get("rayStartParams", {}):
        yield "head: sets Redis by rayStartParams too"
    if "externalStorageNamespace" in options:
        yield "externalStorageNamespace: the two clusters of an upgrade would share it"


def job_faults(spec: dict[str, Any]) -> Iterator[str]:
    ends = spec.get("shutdownAfterJobFinishes", False)
    if spec.get("ttlSecondsAfterFinished", 0) and not ends:
        yield "ttlSecondsAfterFinished: without effect, the cluster is not shut down"
    if "deletionStrategy" in spec and ends:
        yield "deletionStrategy and shutdownAfterJobFinishes exclude each other"
    if spec.get("suspend") and not ends:
        yield "suspend: needs shutdownAfterJobFinishes"
    if spec.get("suspend") and "clusterSelector" in spec:
        yield "suspend: not with clusterSelector"
    for field in ("backoffLimit", "activeDeadlineSeconds", "ttlSecondsAfterFinished"):
        if spec.get(field, 0) <= 0:
            yield f"{field}: missing"


def longest_days(spec: dict[str, Any]) -> float:
    """How long a RayJob may run: KubeRay 1.7.0 counts its deadline anew for each attempt."""
    return float((spec["backoffLimit"] + 1) * spec["activeDeadlineSeconds"] / 86400)


def service_faults(spec: dict[str, Any]) -> Iterator[str]:
    for field in ("deploymentUnhealthySecondThreshold", "serviceUnhealthySecondThreshold"):
        if field in spec:
            yield f"{field}: is not used by KubeRay 1.7.0"
    upgrade = spec.get("upgradeStrategy", {})
    if upgrade.get("type") not in UPGRADES:
        yield f"upgradeStrategy.type: not one of {sorted(UPGRADES)}"
    if not spec.get("excludeHeadPodFromServeSvc"):
        yield "excludeHeadPodFromServeSvc: the head, which has no replica, gets requests"
    if upgrade.get("type") != "NewClusterWithIncrementalUpgrade":
        return
    options = upgrade.get("clusterUpgradeOptions", {})
    if not spec["rayClusterConfig"].get("enableInTreeAutoscaling"):
        yield "an incremental upgrade needs the autoscaler"
    if not options.get("gatewayClassName") or options.get("intervalSeconds", 0) <= 0:
        yield "clusterUpgradeOptions: gatewayClassName and intervalSeconds are missing"
    if not all(0 < options.get(field, 0) <= 100 for field in ("maxSurgePercent", "stepSizePercent")):
        yield "clusterUpgradeOptions: not a percentage"
    if any(group["minReplicas"] for group in spec["rayClusterConfig"]["workerGroupSpecs"]):
        yield "minReplicas: the new cluster would begin at full size"
