"""The manifests hold to KubeRay's cross-field rules, and each rule finds its breach."""

from typing import Any

import pytest

from tests.k8s.manifests import OVERLAYS, ROOT, find, ray_objects, with_value
from tests.k8s.operator_rules import faults, longest_days

(RAY_VERSION,) = [
    line.removeprefix("ray==")
    for line in (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    if line.startswith("ray==")
]
JOB, CLUSTER, SERVICE = "spec", "spec.rayClusterSpec", "spec.rayClusterConfig"
HEAD = f"{CLUSTER}.headGroupSpec"
GPU = f"{CLUSTER}.workerGroupSpecs.1"

JOB_BREACHES: list[tuple[str, Any, str]] = [
    ("metadata.name", "Pipeline", "metadata.name"),
    (f"{CLUSTER}.rayVersion", "2.52.0", "rayVersion"),
    (f"{CLUSTER}.rayVersion", None, "rayVersion"),
    (f"{CLUSTER}.authOptions", {}, "authOptions"),
    (f"{CLUSTER}.autoscalerOptions.version", "v1", "autoscalerOptions.version"),
    (f"{CLUSTER}.enableInTreeAutoscaling", False, "autoscalerOptions: without effect"),
    (f"{HEAD}.rayStartParams.num-cpus", "4", "head: takes work"),
    (f"{HEAD}.rayStartParams.num-cpus", 0, "head: rayStartParams must be strings"),
    (f"{HEAD}.template.spec.restartPolicy", "Always", "head: the autoscaler needs"),
    (f"{HEAD}.rayStartParams.labels", "a=b", "head: labels"),
    (f"{HEAD}.resources", {"CPU": "1"}, "head: resources both in the group"),
    (f"{GPU}.rayStartParams.num-gpus", "1", "gpu: resources both in the container"),
    (f"{GPU}.template.spec.restartPolicy", None, "gpu: the autoscaler needs"),
    (f"{GPU}.suspend", True, "gpu: suspended"),
    (f"{GPU}.minReplicas", 9, "gpu: minReplicas"),
    (f"{GPU}.template.spec.containers.0.resources.requests.memory", "1Gi", "gpu: requests and limits"),
    (f"{JOB}.shutdownAfterJobFinishes", False, "ttlSecondsAfterFinished"),
    (f"{JOB}.deletionStrategy", {"deletionRules": []}, "deletionStrategy and"),
    (f"{JOB}.backoffLimit", None, "backoffLimit"),
    (f"{JOB}.activeDeadlineSeconds", None, "activeDeadlineSeconds"),
]
REDIS = f"{SERVICE}.gcsFaultToleranceOptions"
SERVICE_BREACHES: list[tuple[str, Any, str]] = [
    (f"{REDIS}.redisPassword", {"value": "secret"}, "redisPassword"),
    (f"{REDIS}.externalStorageNamespace", "diffray", "externalStorageNamespace"),
    (f"{SERVICE}.headGroupSpec.rayStartParams.redis-password", "secret", "head: sets Redis by rayStart"),
    (
        f"{SERVICE}.headGroupSpec.template.spec.containers.0.env",
        [{"name": "REDIS_PASSWORD", "value": "secret"}],
        "head: sets Redis by environment",
    ),
    (f"{SERVICE}.enableInTreeAutoscaling", False, "an incremental upgrade needs"),
    (f"{SERVICE}.workerGroupSpecs.0.minReplicas", 2, "minReplicas: the new cluster"),
    ("spec.upgradeStrategy.type", "Rolling", "upgradeStrategy.type"),
    ("spec.upgradeStrategy.clusterUpgradeOptions.gatewayClassName", "", "clusterUpgradeOptions: gateway"),
    ("spec.upgradeStrategy.clusterUpgradeOptions.maxSurgePercent", 200, "clusterUpgradeOptions: not"),
    ("spec.excludeHeadPodFromServeSvc", False, "excludeHeadPodFromServeSvc"),
    ("spec.deploymentUnhealthySecondThreshold", 900, "deploymentUnhealthySecondThreshold: is not used"),
    ("spec.serviceUnhealthySecondThreshold", 1800, "serviceUnhealthySecondThreshold: is not used"),
]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_operator_has_nothing_to_say_against_an_overlay(overlay: str) -> None:
    for manifest in ray_objects(overlay):
        assert not list(faults(manifest, RAY_VERSION)), manifest["metadata"]["name"]


def says(kind: str, name: str, path: str, value: Any) -> str:
    return "\n".join(faults(with_value(find("gpu", kind, name), path, value), RAY_VERSION))


@pytest.mark.parametrize(("path", "value", "fault"), JOB_BREACHES)
def test_a_breach_in_a_job_is_found(path: str, value: Any, fault: str) -> None:
    assert fault in says("RayJob", "diffray-pipeline", path, value)


@pytest.mark.parametrize(("path", "value", "fault"), SERVICE_BREACHES)
def test_a_breach_in_the_service_is_found(path: str, value: Any, fault: str) -> None:
    assert fault in says("RayService", "diffray-serving", path, value)


def test_a_suspended_job_must_be_shut_down_at_its_end() -> None:
    job = with_value(find("kueue", "RayJob", "diffray-train"), "spec.shutdownAfterJobFinishes", False)
    assert "suspend: needs shutdownAfterJobFinishes" in list(faults(job, RAY_VERSION))


def test_a_head_with_a_gpu_is_found() -> None:
    job = find("gpu", "RayJob", "diffray-train")
    head = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    head["resources"]["limits"]["nvidia.com/gpu"] = "1"
    assert "head: has a GPU" in list(faults(job, RAY_VERSION))


def test_both_jobs_run_on_clusters_of_the_interactive_one_s_shape() -> None:
    pattern = find("gpu", "RayCluster", "diffray-interactive")["spec"]
    for name in ("diffray-pipeline", "diffray-train"):
        cluster = find("gpu", "RayJob", name)["spec"]["rayClusterSpec"]
        for group, same in zip(cluster["workerGroupSpecs"], pattern["workerGroupSpecs"], strict=True):
            assert group["template"]["spec"] == same["template"]["spec"]
        assert cluster["headGroupSpec"]["template"]["spec"] == pattern["headGroupSpec"]["template"]["spec"]


def test_the_longest_time_of_a_job_is_the_one_that_is_told() -> None:
    manifest = (ROOT / "k8s" / "base" / "jobs.yaml").read_text(encoding="utf-8")
    for name, days in (("diffray-pipeline", 12), ("diffray-train", 4)):
        assert longest_days(find("gpu", "RayJob", name)["spec"]) == days
        assert f"{days} days at most" in manifest
    assert longest_days(find("dev", "RayJob", "diffray-pipeline")["spec"]) * 24 == 8
    text = " ".join((ROOT / "docs" / "kubernetes.md").read_text(encoding="utf-8").split())
    assert "all four together end after 12 days at the latest" in text
