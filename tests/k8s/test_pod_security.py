"""No container can do more than it must: rights, tokens, secrets, images."""

import re
from copy import deepcopy
from typing import Any

import pytest
from ray.autoscaler._private.kuberay import node_provider

from tests.k8s.manifests import OVERLAYS, Pod, cluster_of, find, pods, ray_objects, render
from tests.k8s.pod_security import container_faults, faults

TOKEN_FOLDER = node_provider.IN_CLUSTER_TOKEN_PATH.rpartition("/")[0]


def serving_worker() -> Pod:
    return deepcopy(next(pod for pod in pods("gpu") if pod.name == "RayService diffray-serving: gpu"))


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_pod_is_restricted(overlay: str) -> None:
    assert len(pods(overlay)) > 10
    for pod in pods(overlay):
        assert not list(faults(pod)), pod.name


@pytest.mark.parametrize(
    ("field", "value", "fault"),
    [
        ("automountServiceAccountToken", None, "gets a service account's token"),
        ("hostNetwork", True, "shares the host's namespaces"),
        ("securityContext", {"runAsUser": 0, "runAsNonRoot": True}, "may run as root"),
        ("securityContext", {"runAsUser": 1000, "runAsNonRoot": True}, "has no seccomp profile"),
        ("volumes", [{"name": "disk", "hostPath": {"path": "/"}}], "volume disk is of a kind"),
        ("volumes", [{"name": "tmp", "emptyDir": {}}], "volume tmp may fill"),
        ("enableServiceLinks", True, "addresses of services"),
        ("initContainers", [{"name": "copy"}], "copy may gain privileges"),
    ],
)
def test_a_pod_that_is_not_restricted_is_found(field: str, value: Any, fault: str) -> None:
    pod = serving_worker()
    pod.spec[field] = value
    assert fault in "\n".join(faults(pod))


@pytest.mark.parametrize(
    ("field", "value", "fault"),
    [
        ("allowPrivilegeEscalation", True, "may gain privileges"),
        ("capabilities", {"add": ["SYS_ADMIN"]}, "keeps capabilities"),
        ("readOnlyRootFilesystem", False, "can write to its image"),
    ],
)
def test_a_container_that_is_not_restricted_is_found(field: str, value: Any, fault: str) -> None:
    pod = serving_worker()
    pod.containers[0]["securityContext"][field] = value
    assert [f"ray-worker {fault}"] == list(faults(pod))


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_autoscaler_is_restricted_and_alone_sees_the_token(overlay: str) -> None:
    for manifest in ray_objects(overlay):
        cluster = cluster_of(manifest)
        if not cluster["enableInTreeAutoscaling"]:
            assert "autoscaler-token" not in str(cluster)
            continue
        options = cluster["autoscalerOptions"]
        assert not list(container_faults(options))
        mounts = {mount["name"]: mount["mountPath"] for mount in options["volumeMounts"]}
        assert mounts == {"tmp": "/tmp", "autoscaler-token": TOKEN_FOLDER}
        volumes = cluster["headGroupSpec"]["template"]["spec"]["volumes"]
        (token,) = [each["projected"]["sources"] for each in volumes if each["name"] == "autoscaler-token"]
        files = {"token", "ca.crt", "namespace"}
        assert {item["path"] for source in token for item in _items(source)} == files
        for pod in pods(overlay):
            assert all(mount["name"] != "autoscaler-token" for mount in pod.containers[0]["volumeMounts"])


def _items(source: dict[str, Any]) -> list[dict[str, Any]]:
    (content,) = source.values()
    items: list[dict[str, Any]] = content.get("items", [content])
    return items


def images(overlay: str) -> set[str]:
    return {container["image"] for pod in pods(overlay) for container in pod.containers}


BY_DIGEST = re.compile(r"[\w.-]+(/[\w.-]+)+@sha256:[0-9a-f]{64}")


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_images_are_named_by_digest_never_by_tag(overlay: str) -> None:
    assert [image for image in images(overlay) if not BY_DIGEST.fullmatch(image)] == []


@pytest.mark.parametrize(
    "image", ["redis", "docker.io/library/redis:8", "docker.io/library/redis:8@sha256:" + 64 * "0"]
)
def test_a_tag_is_no_digest(image: str) -> None:
    assert not BY_DIGEST.fullmatch(image)


SECRETIVE = re.compile(r"PASSWORD|SECRET|TOKEN|ACCESS_KEY|CREDENTIAL", re.IGNORECASE)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_no_secret_stands_in_a_manifest(overlay: str) -> None:
    assert not [each for each in render(overlay) if each["kind"] == "Secret"]
    for manifest in render(overlay):
        for name, value in manifest.get("data", {}).items():
            assert not SECRETIVE.search(name), f"{name} in a ConfigMap"
            assert not re.search(r"://[^/@:]+:[^/@]+@", value), f"{name} holds a password"
    variables = [
        variable for pod in pods(overlay) for each in pod.containers for variable in each.get("env", [])
    ]
    secret = [variable for variable in variables if SECRETIVE.search(variable["name"])]
    assert len(secret) >= 4
    assert all("secretKeyRef" in variable["valueFrom"] for variable in secret)


def test_the_namespace_enforces_the_standard() -> None:
    labels = find("gpu", "Namespace", "diffray")["metadata"]["labels"]
    for mode in ("enforce", "audit", "warn"):
        assert labels[f"pod-security.kubernetes.io/{mode}"] == "restricted"
