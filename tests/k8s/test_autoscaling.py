"""Ray's own autoscaler, reading our clusters, rents from zero what our configurations need."""

import shlex
from typing import Any

import pytest
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.scripts.scripts import drain_node

from cluster.capacity import check_resources
from ray_jobs.config import ConfigError, load_config
from tests.k8s.manifests import ROOT, cluster_of, find, pods

CONFIG = {
    overlay: load_config(ROOT / "configs" / f"{name}.yaml")
    for overlay, name in {
        "gpu": "kubernetes",
        "gpu8": "kubernetes",
        "kueue": "kubernetes",
        "dev": "kubernetes_dev",
    }.items()
}


def node_types(overlay: str, kind: str, name: str) -> dict[str, dict[str, Any]]:
    """Group -> what the autoscaler makes of it: min_workers, max_workers, resources."""
    manifest = find(overlay, kind, name)
    cluster = {"metadata": manifest["metadata"], "spec": cluster_of(manifest)}
    types: dict[str, dict[str, Any]] = _derive_autoscaling_config_from_ray_cr(cluster)["available_node_types"]
    return types


def largest(types: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Logical resources of a cluster that has grown as far as it may."""
    return {
        resource: sum(each["max_workers"] * each["resources"].get(resource, 0) for each in types.values())
        for resource in ("CPU", "GPU")
    }


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("RayJob", "diffray-pipeline"),
        ("RayJob", "diffray-train"),
        ("RayCluster", "diffray-interactive"),
        ("RayService", "diffray-serving"),
    ],
)
def test_gpus_are_rented_from_zero(kind: str, name: str) -> None:
    types = node_types("gpu", kind, name)
    assert types["headgroup"]["resources"]["CPU"] == 0
    assert "GPU" not in types["headgroup"]["resources"]
    assert types["gpu"]["resources"]["GPU"] == 1
    assert types["gpu"]["min_workers"] == 0 < types["gpu"]["max_workers"]


@pytest.mark.parametrize("overlay", CONFIG)
def test_the_run_fits_the_cluster_at_its_largest(overlay: str) -> None:
    check_resources(CONFIG[overlay], largest(node_types(overlay, "RayJob", "diffray-pipeline")))


def test_a_cluster_of_fewer_gpus_would_be_found() -> None:
    types = node_types("gpu", "RayJob", "diffray-pipeline")
    types["gpu"]["max_workers"] = 3
    with pytest.raises(ConfigError, match="needs 4 logical GPUs, but the cluster has 3"):
        check_resources(CONFIG["gpu"], largest(types))


@pytest.mark.parametrize("name", ["diffray-pipeline", "diffray-train"])
def test_whole_nodes_hold_eight_workers_with_their_network_and_memory(name: str) -> None:
    types = node_types("gpu8", "RayJob", name)
    assert types["gpu8"]["resources"]["GPU"] == 8 and "gpu" not in types
    (pod,) = [each for each in pods("gpu8") if each.name == f"RayJob {name}: gpu8"]
    limits = pod.containers[0]["resources"]["limits"]
    assert [key for key in limits if key.startswith("rdma/")]
    # KubeRay sizes /dev/shm by the memory, unless a pod brings its own.
    assert not any(mount["mountPath"] == "/dev/shm" for mount in pod.containers[0]["volumeMounts"])
    settings = find("gpu8", "ConfigMap", "diffray-settings")["data"]
    assert settings["NCCL_SOCKET_IFNAME"] == "eth0" and settings["NCCL_DEBUG"] == "WARN"


@pytest.mark.parametrize("overlay", ["gpu", "gpu8", "kueue"])
def test_pods_without_gpus_see_none_of_their_node(overlay: str) -> None:
    """The image asks for all GPUs, which the device plugin narrows down only where a pod reserves some."""
    for pod in [each for each in pods(overlay) if each.role in ("head", "worker")]:
        container = pod.containers[0]
        hidden = {"name": "NVIDIA_VISIBLE_DEVICES", "value": "void"} in container.get("env", [])
        reserves = "nvidia.com/gpu" in container["resources"]["limits"]
        assert hidden is not reserves, pod.name


@pytest.mark.parametrize("overlay", CONFIG)
def test_a_worker_and_a_replica_fit_a_node(overlay: str) -> None:
    config = CONFIG[overlay]
    worker = {"CPU": config.train.cpus_per_worker, "GPU": int(config.train.use_gpu)}
    replica = {"CPU": 1, "GPU": int(config.serve.use_gpu)}
    for kind, name, need in (
        ("RayJob", "diffray-pipeline", worker),
        ("RayService", "diffray-serving", replica),
    ):
        types = node_types(overlay, kind, name).values()
        assert any(all(each["resources"].get(what, 0) >= n for what, n in need.items()) for each in types)


@pytest.mark.parametrize("overlay", CONFIG)
def test_a_node_that_goes_away_has_the_time_to_write_a_checkpoint(overlay: str) -> None:
    """What the hook tells Ray is a command that Ray understands, and ends before Kubernetes kills the pod."""
    for pod in [pod for pod in pods(overlay) if pod.role == "worker"]:
        hook = pod.containers[0]["lifecycle"]["preStop"]["exec"]["command"]
        assert hook[:2] == ["/bin/bash", "-c"]
        announce, _, wait = hook[2].partition("&&")
        program, command, *arguments = shlex.split(announce)
        assert (program, command) == ("ray", drain_node.name)
        told = drain_node.make_context(command, arguments).params
        assert told["reason"] == "DRAIN_NODE_REASON_PREEMPTION"  # what Ray Train's workers look for
        deadline = told["deadline_remaining_seconds"]
        assert wait.split() == ["sleep", str(deadline)]
        assert 60 <= deadline <= pod.spec["terminationGracePeriodSeconds"] - 20


def test_gpu_nodes_tolerate_what_keeps_others_off() -> None:
    for name in ("diffray-pipeline", "diffray-train"):
        groups = find("gpu", "RayJob", name)["spec"]["rayClusterSpec"]["workerGroupSpecs"]
        keys = {
            group["groupName"]: {each["key"] for each in group["template"]["spec"]["tolerations"]}
            for group in groups
        }
        assert "nvidia.com/gpu" in keys["gpu"] and "nvidia.com/gpu" not in keys["cpu"]
        assert {"cloud.google.com/gke-spot", "kubernetes.azure.com/scalesetpriority"} <= keys["gpu"] & keys[
            "cpu"
        ]
        head = find("gpu", "RayJob", name)["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
        assert "tolerations" not in head
