"""The endpoint with a registered model behind it, shared by the tests of this folder."""

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ray_jobs.config import Config
from ray_jobs.promotion import Measured
from ray_jobs.registration import register
from ray_jobs.registry import RegisteredModel, champion


@pytest.fixture(scope="session")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all tests, because a new SQLite registry takes seconds."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="session")
def config(storage: Path, tiny_model: Path) -> Config:
    return Config.model_validate(
        {
            "name": "demo",
            "storage": str(storage),
            "data": {"source": "unused"},
            "model": {"base": str(tiny_model)},
            "search": {"learning_rates": [1e-3], "ladder": [2]},
            "publish": {"model_name": "served"},
            "serve": {"default_steps": 2, "max_queued_requests": 4},
        }
    )


@pytest.fixture(scope="session")
def lora_folder(storage: Path, tiny_model: Path) -> Path:
    """Adapters that change the model's pictures, as a finished search would leave them."""
    import torch

    from ray_jobs.diffusion.families import family_of
    from ray_jobs.diffusion.finetuning import FineTuning, add_lora, save_lora
    from ray_jobs.diffusion.loading import load_pipeline
    from ray_jobs.diffusion.objectives import LossSettings

    torch.manual_seed(0)
    pipeline = load_pipeline(str(tiny_model))
    add_lora(pipeline.unet, rank=4, alpha=4, dropout=0.0, target_modules=["to_q", "to_v"])
    for name, parameter in pipeline.unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    folder = storage / "demo" / "model"
    folder.mkdir(parents=True)
    family = family_of(pipeline)
    model = FineTuning(pipeline, family, family.objective(pipeline.scheduler.config), LossSettings())
    save_lora(pipeline, model, dict(model.trained()), folder)
    return folder


@pytest.fixture(scope="session")
def registered(config: Config, lora_folder: Path) -> RegisteredModel:
    measured = Measured(12.5, None, num_samples=96, feature_network="inception@sha256:7ff4", data="9f" * 32)
    register(config, source=str(lora_folder), measured=measured, params={"learning_rate": "0.001"})
    return champion(config)


@pytest.fixture(scope="module")
def url(ray_cluster: Any, config: Config, registered: RegisteredModel) -> Iterator[str]:
    """A running endpoint; stopped with its module, because it takes a share of a core even when idle."""
    from serving.command import endpoint

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    with endpoint(config, registered, port) as address:
        yield address
