"""Every overlay renders, and Kubernetes' own strict schemas know every key of it."""

import json
from copy import deepcopy
from functools import cache
from typing import Any

import kubernetes_validate
import pytest

from tests.k8s.manifests import OVERLAYS, Pod, find, pods, render

KUBERNETES = "1.37"
WITHOUT_SCHEMA = {"RayCluster", "RayJob", "RayService", "PodMonitor"}  # of operators, not of Kubernetes


@cache
def _validate(text: str) -> None:
    kubernetes_validate.validate(json.loads(text), KUBERNETES, strict=True)


def validate(manifest: dict[str, Any]) -> None:
    """Look at what several overlays have alike once: each look reads all of Kubernetes' definitions."""
    _validate(json.dumps(manifest, sort_keys=True))


def as_object(pod: Pod) -> dict[str, Any]:
    """A pod template that Kubernetes has no schema for, as one of a kind that it has one for."""
    return {"apiVersion": "v1", "kind": "PodTemplate", "template": {"metadata": {}, "spec": pod.spec}}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_objects_of_an_overlay_hold_to_the_strict_schemas(overlay: str) -> None:
    for manifest in render(overlay):
        if manifest["kind"] not in WITHOUT_SCHEMA:
            validate(manifest)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_pod_templates_of_ray_hold_to_the_strict_schemas(overlay: str) -> None:
    of_ray = [pod for pod in pods(overlay) if pod.role]
    assert {pod.role for pod in of_ray} == {"head", "worker", "submitter"}
    for pod in of_ray:
        validate(as_object(pod))


def test_a_misspelt_key_of_a_pod_template_is_an_error() -> None:
    pod = deepcopy(next(pod for pod in pods("gpu") if "tolerations" in pod.spec))
    pod.spec["toleration"] = pod.spec.pop("tolerations")
    with pytest.raises(kubernetes_validate.ValidationError, match="toleration"):
        validate(as_object(pod))


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_all_lies_in_one_namespace_and_can_be_applied_by_its_part(overlay: str) -> None:
    for manifest in render(overlay):
        metadata = manifest["metadata"]
        assert metadata["labels"]["app.kubernetes.io/part-of"] == "diffray", metadata["name"]
        assert metadata["labels"]["app.kubernetes.io/component"], metadata["name"]
        assert metadata["name" if manifest["kind"] == "Namespace" else "namespace"] == "diffray"


def test_each_overlay_has_the_jobs_a_cluster_to_work_on_and_the_endpoint() -> None:
    for overlay in OVERLAYS:
        names = [each["metadata"]["name"] for each in render(overlay) if each["apiVersion"] == "ray.io/v1"]
        assert sorted(names) == [
            "diffray-interactive",
            "diffray-pipeline",
            "diffray-serving",
            "diffray-train",
        ]


def test_kueue_gets_suspended_jobs_of_a_fixed_size_in_its_queue() -> None:
    for name in ("diffray-pipeline", "diffray-train"):
        job = find("kueue", "RayJob", name)
        cluster = job["spec"]["rayClusterSpec"]
        assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "diffray"
        assert job["spec"]["suspend"] is True
        assert job["spec"]["shutdownAfterJobFinishes"] is True  # Kueue admits no other
        assert cluster["enableInTreeAutoscaling"] is False
        for group in cluster["workerGroupSpecs"]:
            assert group["replicas"] == group["minReplicas"] == group["maxReplicas"] > 0


def test_the_ingress_ends_tls_before_the_gateway_of_the_service() -> None:
    ingress = find("ingress", "Ingress", "diffray-serving")["spec"]
    service = find("ingress", "RayService", "diffray-serving")
    options = service["spec"]["upgradeStrategy"]["clusterUpgradeOptions"]
    (rule,) = ingress["rules"]
    (path,) = rule["http"]["paths"]
    assert ingress["tls"] == [{"hosts": [rule["host"]], "secretName": "diffray-serving-tls"}]
    # KubeRay names the Gateway after the RayService, Istio the Gateway's service after it and its class.
    gateway = f"{service['metadata']['name']}-gateway-{options['gatewayClassName']}"
    assert path["backend"]["service"] == {"name": gateway, "port": {"number": 80}}
