"""The endpoint with a registered model behind it, shared by the tests of this folder."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from ray_jobs.config import Config, EvaluateConfig
from ray_jobs.registry.models import REFERENCE, RegisteredModel, champion
from ray_jobs.registry.promotion import Measured
from ray_jobs.registry.registration import register
from serving.http.api_keys import Scope, add_key

KEYS = "keys.json"
WINDOW = 16  # pictures that drift is told of


@pytest.fixture(scope="session")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all tests, because a new SQLite registry takes seconds."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="session")
def key(storage: Path) -> str:
    """An API key that may do everything."""
    scopes: frozenset[Scope] = frozenset({"generate", "feedback", "admin"})
    return add_key(storage / KEYS, "all", scopes, requests_per_minute=100_000, concurrent_requests=64)


@pytest.fixture(scope="session")
def config(storage: Path, tiny_model: Path, key: str) -> Config:
    return Config.model_validate(
        {
            "name": "demo",
            "storage": str(storage),
            "data": {"source": "unused"},
            "model": {"base": str(tiny_model)},
            "search": {"learning_rates": [1e-3], "ladder": [2]},
            "publish": {"model_name": "served"},
            "serve": {
                "default_steps": 2,
                "max_queued_requests": 4,
                "keys": str(storage / KEYS),
                "safety_checker": "tests.serving.plain_pictures:make_shape_checker",
                "drift_pictures": WINDOW,
            },
        }
    )


def reference() -> dict[str, np.ndarray]:
    """Features as publish leaves them, of no pictures in particular."""
    from ray_jobs.weights.feature_networks import load_first

    network = load_first(EvaluateConfig()).identity
    drawn = np.random.default_rng(0).random((24, 2048), dtype=np.float32)
    found = {"validation": drawn, "restored": drawn[::-1].copy(), "near_copy": np.full(1, 0.5, np.float32)}
    return {f"{network}/{kind}": each for kind, each in found.items()}


def save_adapters(base: Path, folder: Path, seed: int) -> Path:
    """Adapters that change the model's pictures, as a finished search would leave them."""
    import torch

    from ray_jobs.diffusion.families import family_of
    from ray_jobs.diffusion.finetuning import FineTuning, add_lora
    from ray_jobs.diffusion.objectives import LossSettings
    from ray_jobs.weights.loading import load_pipeline
    from ray_jobs.weights.saving import save_lora

    torch.manual_seed(seed)
    pipeline = load_pipeline(str(base))
    add_lora(pipeline.unet, rank=4, alpha=4, dropout=0.0, target_modules=["to_q", "to_v"])
    for name, parameter in pipeline.unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    folder.mkdir(parents=True)
    family = family_of(pipeline)
    model = FineTuning(pipeline, family, family.schedule.objective(pipeline.scheduler.config), LossSettings())
    save_lora(pipeline, model, dict(model.trained()), folder)
    return folder


@pytest.fixture(scope="session")
def lora_folder(storage: Path, tiny_model: Path) -> Path:
    return save_adapters(tiny_model, storage / "demo" / "model", seed=0)


@pytest.fixture(scope="session")
def registered(config: Config, lora_folder: Path) -> RegisteredModel:
    measured = Measured(12.5, None, num_samples=96, feature_network="inception@sha256:7ff4", data="9f" * 32)
    (lora_folder / REFERENCE).write_bytes(save(reference()))
    register(config, source=str(lora_folder), measured=measured, params={"learning_rate": "0.001"})
    return champion(config)


@contextmanager
def served(config: Config, registered: RegisteredModel) -> Iterator[str]:
    """A running endpoint on a free port."""
    from serving.command import endpoint, free_port

    with endpoint(config, registered, free_port("127.0.0.1", 0)) as address:
        yield address


@pytest.fixture(scope="module")
def url(ray_cluster: Any, config: Config, registered: RegisteredModel) -> Iterator[str]:
    """A running endpoint; stopped with its module, because it takes a share of a core even when idle."""
    with served(config, registered) as address:
        yield address


def loads() -> list[Any]:
    """What the running endpoint's replicas do."""
    from ray import serve

    return serve.get_deployment_handle("Model", "diffray").broadcast("load").results(timeout_s=60)


def wait_until(true: Callable[[], Any], timeout_s: float = 60) -> Any:
    """What `true` returns once it is true."""
    deadline = time.monotonic() + timeout_s
    while not (value := true()):
        assert time.monotonic() < deadline, "it does not come true"
        time.sleep(0.05)
    return value
