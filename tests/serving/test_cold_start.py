"""The endpoint starts while the champion's weights are damaged: the version that it replaced is served."""

import asyncio
import time
from pathlib import Path
from typing import Any, cast

import pytest
from ray.serve.handle import DeploymentHandle

from ray_jobs.config import Config
from ray_jobs.registry import aliases
from ray_jobs.registry.models import champion, open_client, registered
from ray_jobs.registry.promotion import Measured
from ray_jobs.registry.registration import register
from serving.command import intact
from serving.messages import BaseTraits
from serving.schemas import APIError
from serving.service.canary import Canary, Limits
from serving.service.registry_watcher import RegistryWatcher, warmed_up
from serving.service.replica_client import ReplicaClient
from serving.service.routing import Catalogue
from tests.record import record_fault
from tests.serving.conftest import save_adapters
from tests.serving.test_replica import with_replica


@pytest.fixture(scope="module")
def damaged(config: Config, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Version 2 is the champion, of which a bit turned over; 1 is the previous one."""
    publish = config.publish.model_copy(update={"model_name": "cold"})
    config = config.model_copy(update={"publish": publish})
    for seed, fid in ((1, 20.0), (2, 10.0)):
        folder = save_adapters(tiny_model, tmp_path_factory.mktemp("cold") / str(seed), seed)
        measured = Measured(fid, None, num_samples=96, feature_network="inception@1", data="9f" * 32)
        register(config, source=str(folder), measured=measured, params={})
    aliases.promote(config, 2)
    weights = Path(champion(config).source) / "pytorch_lora_weights.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    return config


def test_the_version_that_a_damaged_champion_replaced_is_served_and_told(
    damaged: Config, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    broken, former = champion(damaged), registered(damaged, "1")

    async def start(model: Any) -> tuple[Any, RegistryWatcher, BaseTraits]:
        first = await warmed_up(damaged, broken, model)
        catalogue = Catalogue(first.name, first, damaged.serve.models, 0.0)
        watcher = RegistryWatcher(damaged, catalogue, model, Canary(Limits(100, 0.5, 5.0)))
        await watcher.poll()
        return catalogue.champion, watcher, await model.traits()

    for fused in (False, True):
        begun = time.monotonic()
        caplog.clear()
        settings = damaged.serve.model_copy(update={"fuse_champion": fused})
        damaged = damaged.model_copy(update={"serve": settings})
        served, watcher, size = with_replica(broken, start, fuse_champion=fused)
        assert (served, size) == (former, BaseTraits(height=64, width=64, max_references=0))
        assert watcher.notice is not None
        assert "cold@2 cannot be served" in watcher.notice and "cold@1 stays" in watcher.notice
        assert "cold@1, which it replaced, is served" in caplog.text
    record_fault(
        "a bit turns over in the champion's weights before the endpoint starts",
        recovery_s=time.monotonic() - begun,
        lost="no request: the version before it answers",
    )
    assert intact(damaged, broken) == former
    assert "version 1, which it replaced, is served" in capsys.readouterr().out


def test_without_a_version_before_it_the_endpoint_does_not_start(damaged: Config) -> None:
    open_client(damaged).delete_registered_model_alias("cold", "previous")
    broken = champion(damaged)

    async def start(model: Any) -> None:
        with pytest.raises(APIError, match="cold@\\d cannot be served"):
            await warmed_up(damaged, broken, model)

    with_replica(broken, start)


def test_a_refused_version_is_tried_again_after_pauses_that_double_and_at_once_after_another(
    damaged: Config,
) -> None:
    settings = damaged.serve.model_copy(update={"follow_s": 0.5})
    damaged = damaged.model_copy(update={"serve": settings})
    former = registered(damaged, "1")
    attempts: list[int] = []

    async def follow(model: Any) -> None:
        warm_up = model.warm_up

        async def counted(version: Any, fused: bool = False) -> None:
            attempts.append(version.version)
            await warm_up(version, fused)

        model.warm_up = counted
        catalogue = Catalogue(former.name, former, [], 0.0)
        watcher = RegistryWatcher(damaged, catalogue, model, Canary(Limits(100, 0.5, 5.0)))

        async def polled(seconds: float) -> list[int]:
            attempts.clear()
            end = asyncio.get_running_loop().time() + seconds
            while asyncio.get_running_loop().time() < end:
                await watcher.poll()
                assert watcher.notice is not None and "cold@2 cannot be served" in watcher.notice
                assert catalogue.champion == former
                await asyncio.sleep(0.05)
            return list(attempts)

        # At 0, 0.5 and 1.5 s, or later; with equal pauses it would be six times.
        assert await polled(3) in ([2, 2], [2, 2, 2], [2, 2, 2, 2])
        client = open_client(damaged)
        client.set_registered_model_alias("cold", "champion", "1")
        await watcher.poll()
        assert watcher.notice is None and attempts[-1] == 1
        client.set_registered_model_alias("cold", "champion", "2")
        assert await polled(0.3) == [2]

    with_replica(former, follow)


class Asleep:
    """Serve's handle of a deployment without a replica."""

    def broadcast(self, *_: Any) -> "Asleep":
        return self

    async def results_async(self, **_: Any) -> list[Any]:
        return []


def test_while_no_replica_runs_a_versions_weights_are_read_once(
    config: Config, tiny_model: Path, tmp_path: Path
) -> None:
    publish = config.publish.model_copy(update={"model_name": "asleep"})
    config = config.model_copy(update={"publish": publish})
    folder = save_adapters(tiny_model, tmp_path / "weights", 1)
    measured = Measured(10.0, None, num_samples=96, feature_network="inception@1", data="9f" * 32)
    register(config, source=str(folder), measured=measured, params={})
    version = registered(config, "1")
    weights = Path(version.source) / "pytorch_lora_weights.safetensors"

    async def look_again_and_again() -> None:
        replicas, anew = (ReplicaClient(cast(DeploymentHandle, Asleep())) for _ in range(2))
        await replicas.warm_up(version)
        weights.unlink()
        await replicas.warm_up(version)
        with pytest.raises(APIError, match="asleep@1 cannot be served"):
            await anew.warm_up(version)

    asyncio.run(look_again_and_again())
