"""Whatever a manifest names exists: modules, configurations, objects, ports, environment variables."""

import json
import re
import shlex
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import make_url

from cluster.submit import parsed
from cluster.variables import SECRET
from ray_jobs.config import Config, load_config
from tests.k8s.manifests import OVERLAYS, ROOT, Manifest, Pod, find, pods, render

IMAGE_FOLDER = "/opt/diffray"  # WORKDIR of cluster/Dockerfile
MADE_BY_USERS = {  # docs/kubernetes.md tells how
    "diffray-api-keys",
    "diffray-hub",
    "diffray-metrics-key",
    "diffray-object-storage",
    "diffray-postgresql",
    "diffray-redis",
    "diffray-update-key",
}
MADE_BY_KUBERNETES = {"kube-root-ca.crt"}
MADE_BY_KUBERAY = {"diffray-interactive"}  # a cluster's token, by authOptions
PACKAGES = Path(find_spec("ray").origin or "").parents[1]  # type: ignore[union-attr]
# Where each prefix of a variable must be found: in the sources of what reads it.
READERS = {
    "RAY_ACCEL_": ["ray/_private/accelerators/accelerator.py"],
    "RAY_TRAIN_": ["ray/train/v2/_internal/constants.py"],
    "RAY_DATA_": ["ray/data/context.py"],
    "RAY_USAGE_": ["ray/_common/usage/usage_constants.py"],
    "MLFLOW_": ["mlflow/environment_variables.py", "mlflow/cli/__init__.py", "mlflow/utils/cli_args.py"],
    "HF_": ["huggingface_hub/constants.py"],
    "TORCH_": ["torch/utils/cpp_extension.py"],
}
OF_OTHER_PROGRAMS = {"HOME", "PGPASSWORD", "PGDATA", "POSTGRES_DB", "POSTGRES_PASSWORD", "POSTGRES_USER"} | {
    "REDIS_PASSWORD",  # of the script in redis.yaml
    *("DIFFRAY_KEY", "RAY_AUTH_TOKEN"),  # of serving/client.py and cluster/submit.py
    *("NCCL_DEBUG", "NCCL_SOCKET_IFNAME", "NVIDIA_VISIBLE_DEVICES"),  # of NVIDIA's library and runtime
}


def configurations(overlay: str) -> set[str]:
    """Every path in an overlay that ends in .yaml."""
    return set(re.findall(r"[\w./-]+\.yaml", json.dumps(render(overlay))))


def loaded(overlay: str) -> list[Config]:
    return [load_config(path.replace(IMAGE_FOLDER, str(ROOT))) for path in configurations(overlay)]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_configurations_are_in_the_image_and_valid(overlay: str) -> None:
    dockerfile = (ROOT / "cluster" / "Dockerfile").read_text(encoding="utf-8")
    assert f"WORKDIR {IMAGE_FOLDER}\n" in dockerfile and dockerfile.count(" configs configs\n") == 2
    assert all(path.startswith(f"{IMAGE_FOLDER}/configs/") for path in configurations(overlay))
    assert len(loaded(overlay)) == 1


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_jobs_start_modules_of_the_project(overlay: str) -> None:
    for name, module in (("diffray-pipeline", "pipeline"), ("diffray-train", "train")):
        program, option, started, *_ = shlex.split(find(overlay, "RayJob", name)["spec"]["entrypoint"])
        assert (program, option, started) == ("python", "-m", f"ray_jobs.{module}")
        assert '__name__ == "__main__"' in (ROOT / "ray_jobs" / f"{module}.py").read_text(encoding="utf-8")


def test_the_update_is_submitted_to_the_interactive_cluster_one_at_a_time() -> None:
    spec = find("gpu", "CronJob", "diffray-update")["spec"]
    assert spec["concurrencyPolicy"] == "Forbid"
    (container,) = spec["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    options, command = parsed(container["command"][3:])
    cluster = find("gpu", "RayCluster", "diffray-interactive")["metadata"]["name"]
    assert options.address == f"http://{cluster}-head-svc:8265"
    assert command[:3] == ["python", "-m", "diffray.update"] and "--if-due" in command
    given = {each["name"] for each in container["env"]}
    assert given >= {"RAY_AUTH_TOKEN", *(set(SECRET) & {"DIFFRAY_KEY", "PGPASSWORD"})}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_a_retry_finds_the_run_in_shared_storage(overlay: str) -> None:
    mounts = {mount["mountPath"] for pod in pods(overlay) for mount in pod.containers[0]["volumeMounts"]}
    for config in loaded(overlay):
        shared = config.storage.startswith(("s3://", "gs://")) or any(
            config.storage.startswith(f"{mount}/") for mount in mounts - {"/tmp"}
        )
        assert shared, config.storage
        assert not re.search(r"\d{4}", config.name), "a time stamp would make each attempt a new run"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_endpoint_s_keys_are_mounted(overlay: str) -> None:
    (config,) = loaded(overlay)
    assert config.serve.keys and not config.serve.allow_anonymous
    for pod in [pod for pod in pods(overlay) if pod.labels["app.kubernetes.io/component"] == "serving"]:
        mounted = {mount["mountPath"]: mount for mount in pod.containers[0]["volumeMounts"]}
        assert mounted[str(Path(config.serve.keys).parent)]["readOnly"] is True


def names_in(node: Any) -> Iterator[tuple[str, str]]:
    """(kind, name) of every object that `node` refers to."""
    if isinstance(node, list):
        for each in node:
            yield from names_in(each)
    if not isinstance(node, dict):
        return
    for key, value in node.items():
        if key in ("secretKeyRef", "secretRef", "credentials"):
            yield "Secret", value["name"]
        elif key in ("configMapRef", "configMap") and "name" in value:
            yield "ConfigMap", value["name"]
        elif key == "secretName" and "hosts" not in node:
            yield "Secret", value
        elif key == "claimName":
            yield "PersistentVolumeClaim", value
        elif key == "serviceAccountName":
            yield "ServiceAccount", value
        yield from names_in(value)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_object_that_is_referred_to_exists(overlay: str) -> None:
    present = {(each["kind"], each["metadata"]["name"]) for each in render(overlay)}
    named = set(names_in(render(overlay)))
    assert {kind for kind, _ in named} >= {"Secret", "ConfigMap", "ServiceAccount"}
    missing = named - present - {("Secret", name) for name in MADE_BY_USERS | MADE_BY_KUBERAY}
    assert missing == {("ConfigMap", name) for name in MADE_BY_KUBERNETES}


def test_the_documentation_tells_how_each_secret_is_made() -> None:
    text = (ROOT / "docs" / "kubernetes.md").read_text(encoding="utf-8")
    used = {name for overlay in OVERLAYS for kind, name in names_in(render(overlay)) if kind == "Secret"}
    assert used - MADE_BY_KUBERAY == MADE_BY_USERS
    assert all(f"create secret generic {name}" in text for name in MADE_BY_USERS)


def services(overlay: str) -> dict[str, Manifest]:
    return {each["metadata"]["name"]: each for each in render(overlay) if each["kind"] == "Service"}


def addresses(overlay: str) -> set[tuple[str, int]]:
    """Host and port of everything inside the cluster that settings and configurations name."""
    urls = [find(overlay, "ConfigMap", "diffray-settings")["data"]["MLFLOW_TRACKING_URI"]]
    urls += [find(overlay, "ConfigMap", "mlflow-settings")["data"]["MLFLOW_BACKEND_STORE_URI"]]
    urls += [config.serve.feedback_url or "" for config in loaded(overlay)]
    found = {(url.host or "", url.port or 5432) for url in map(make_url, urls)}
    service = find(overlay, "RayService", "diffray-serving")["spec"]["rayClusterConfig"]
    host, _, port = service["gcsFaultToleranceOptions"]["redisAddress"].partition(":")
    return found | {(host, int(port))}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_address_is_a_service_with_a_pod_behind_it(overlay: str) -> None:
    assert addresses(overlay) == {("mlflow", 5000), ("postgresql", 5432), ("redis", 6379)}
    for host, port in addresses(overlay):
        spec = services(overlay)[host]["spec"]
        (entry,) = [each for each in spec["ports"] if each["port"] == port]
        (pod,) = [pod for pod in pods(overlay) if spec["selector"].items() <= pod.labels.items()]
        assert entry["targetPort"] in port_names(pod)


def port_names(pod: Pod) -> set[str]:
    return {port["name"] for each in pod.containers for port in each.get("ports", [])}


def test_the_monitors_ask_ports_that_pods_have() -> None:
    monitors = [each for each in render("gpu") if each["kind"] == "PodMonitor"]
    asked = {(each["metadata"]["name"], each["spec"]["podMetricsEndpoints"][0]["port"]) for each in monitors}
    assert asked == {("ray", "metrics"), ("endpoint", "serve")}
    of_ray = [pod for pod in pods("gpu") if pod.role in ("head", "worker")]
    assert all("metrics" in port_names(pod) for pod in of_ray)
    endpoint = find("gpu", "PodMonitor", "endpoint")["spec"]
    selected = endpoint["selector"]["matchLabels"].items()
    (head,) = [pod for pod in of_ray if selected <= pod.labels.items()]
    assert head.role == "head" and "serve" in port_names(head)
    assert endpoint["podMetricsEndpoints"][0]["authorization"]["type"] == "Bearer"


def variables(overlay: str) -> set[str]:
    maps = [find(overlay, "ConfigMap", name)["data"] for name in ("diffray-settings", "mlflow-settings")]
    written = {each["name"] for pod in pods(overlay) for one in pod.containers for each in one.get("env", [])}
    return written | {name for data in maps for name in data}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_environment_variable_is_read_by_something(overlay: str) -> None:
    for name in variables(overlay) - OF_OTHER_PROGRAMS:
        (files,) = [files for prefix, files in READERS.items() if name.startswith(prefix)]
        sources = [PACKAGES / file for file in files if (PACKAGES / file).exists()]
        assert sources, files
        assert any(name in source.read_text(encoding="utf-8") for source in sources), name


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_drivers_of_the_databases_are_installed_with_the_project(overlay: str) -> None:
    urls = [config.serve.feedback_url or "" for config in loaded(overlay)]
    urls.append(find(overlay, "ConfigMap", "mlflow-settings")["data"]["MLFLOW_BACKEND_STORE_URI"])
    drivers = {make_url(url).get_driver_name() for url in urls}
    lock = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    assert all(re.search(rf"^{driver}==", lock, re.MULTILINE) for driver in drivers), drivers
