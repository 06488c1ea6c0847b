"""What the RayService deploys is what Ray's own schema and this project's code know."""

import ast
import json
from typing import Any

import pytest
import yaml
from pydantic import ValidationError
from ray.serve.schema import DeploymentSchema, RayActorOptionsSchema, ServeDeploySchema

from ray_jobs.config import load_config
from ray_jobs.diffusion.solvers import check_scheduler, scheduler_of
from tests.k8s.manifests import OVERLAYS, ROOT, find


def serve_config(overlay: str) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load(
        find(overlay, "RayService", "diffray-serving")["spec"]["serveConfigV2"]
    )
    return config


def unknown_keys(config: dict[str, Any]) -> set[str]:
    """Keys of deployments that Ray would silently pass over."""
    deployments = [
        each for application in config["applications"] for each in application.get("deployments", [])
    ]
    keys = {key for each in deployments for key in each} - set(DeploymentSchema.model_fields)
    options = {key for each in deployments for key in each.get("ray_actor_options", {})}
    return keys | (options - set(RayActorOptionsSchema.model_fields))


def deployments_of_the_code() -> set[str]:
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "serving").rglob("*.py")]
    classes = [node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)]
    return {each.name for each in classes if any("deployment" in ast.unparse(d) for d in each.decorator_list)}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_ray_takes_the_configuration_and_knows_all_its_keys(overlay: str) -> None:
    config = serve_config(overlay)
    ServeDeploySchema.model_validate(config)
    assert unknown_keys(config) == set()


def test_a_misspelt_key_of_an_application_is_refused() -> None:
    config = serve_config("gpu")
    config["applications"][0]["import_pth"] = config["applications"][0].pop("import_path")
    with pytest.raises(ValidationError, match="import_p"):
        ServeDeploySchema.model_validate(config)


def test_a_misspelt_key_of_a_deployment_is_found() -> None:
    config = serve_config("gpu")
    config["applications"][0]["deployments"] = [{"name": "Model", "max_replica_per_node": 1}]
    ServeDeploySchema.model_validate(config)  # Ray itself says nothing
    assert unknown_keys(config) == {"max_replica_per_node"}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_application_is_the_project_s(overlay: str) -> None:
    (application,) = serve_config(overlay)["applications"]
    module, _, function = application["import_path"].partition(":")
    tree = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8"))
    assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    named = {each["name"] for each in application.get("deployments", [])}
    assert named <= deployments_of_the_code()


def test_two_replicas_stand_on_different_nodes() -> None:
    service = find("gpu", "RayService", "diffray-serving")["spec"]
    (model,) = serve_config("gpu")["applications"][0]["deployments"]
    (group,) = service["rayClusterConfig"]["workerGroupSpecs"]
    (rule,) = group["template"]["spec"]["affinity"]["podAntiAffinity"][
        "requiredDuringSchedulingIgnoredDuringExecution"
    ]
    labels = group["template"]["metadata"]["labels"]
    assert model["max_replicas_per_node"] == 1  # a pod is a node of Ray
    assert rule["topologyKey"] == "kubernetes.io/hostname"
    assert rule["labelSelector"]["matchLabels"].items() <= labels.items()
    settings = load_config(ROOT / "configs" / "kubernetes.yaml").serve
    assert 2 <= settings.min_replicas <= settings.max_replicas <= group["maxReplicas"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_ports_and_probes_are_those_that_serve_listens_on(overlay: str) -> None:
    config = serve_config(overlay)
    cluster = find(overlay, "RayService", "diffray-serving")["spec"]["rayClusterConfig"]
    ports = {}
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        (container,) = group["template"]["spec"]["containers"]
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        assert ports["serve"] == config["http_options"]["port"]
    assert config["http_options"]["host"] == "0.0.0.0"
    assert config["proxy_location"] == "EveryNode"  # a readiness probe asks the proxy of its own pod
    (worker,) = cluster["workerGroupSpecs"][0]["template"]["spec"]["containers"]
    assert worker["readinessProbe"]["httpGet"] == {"path": "/readyz", "port": "serve"}
    assert "livenessProbe" not in worker  # KubeRay's asks the raylet


def test_a_disruption_leaves_a_replica() -> None:
    budget = find("gpu", "PodDisruptionBudget", "diffray-serving")["spec"]
    cluster = find("gpu", "RayService", "diffray-serving")["spec"]["rayClusterConfig"]
    labels = cluster["workerGroupSpecs"][0]["template"]["metadata"]["labels"]
    assert budget["minAvailable"] == 1
    assert budget["selector"]["matchLabels"].items() <= labels.items()


# The scheduler files of bases that a configuration takes from the hub, as they are published.
PUBLISHED = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": {
        "_class_name": "PNDMScheduler",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "num_train_timesteps": 1000,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "trained_betas": None,
    }
}


@pytest.mark.parametrize("name", ["demo", "kubernetes", "kubernetes_dev"])
def test_the_endpoint_of_a_configuration_serves_the_base_that_it_trains(name: str) -> None:
    import diffusers

    config = load_config(ROOT / "configs" / f"{name}.yaml")
    base = config.model.base
    own = ROOT / base / "scheduler" / "scheduler_config.json"
    file: Any = PUBLISHED[base] if base in PUBLISHED else json.loads(own.read_text(encoding="utf-8"))
    scheduler = getattr(diffusers, file["_class_name"]).from_config(file)
    check_scheduler(scheduler_of(scheduler, config.serve.solver))
