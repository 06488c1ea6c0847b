"""Versions are registered, found and promoted through a real MLflow server as in a SQLite file."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from ray_jobs.config import Config
from ray_jobs.registry.aliases import promote, rollback, status
from ray_jobs.registry.models import champion, check_store, entries, open_client, verify_weights
from ray_jobs.registry.registration import Registered, register
from ray_jobs.registry.store import versions_of
from ray_jobs.training.tracking import opened_store
from tests.mlflow_server import mlflow_server
from tests.serving.test_registry import weights
from tests.serving.test_versions import MEASURED


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with mlflow_server(tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture
def config(url: str, tmp_path: Path) -> Config:
    return Config.model_validate(
        {
            "name": "a-run",
            "storage": str(tmp_path / "runs"),
            "data": {"source": "unused"},
            "model": {"base": "unused"},
            "search": {"learning_rates": [1e-3], "ladder": [2]},
            "publish": {"tracking_uri": url},
        }
    )


def publish(config: Config, folder: Path, number: int, fid: float) -> Registered:
    source = weights(folder / f"model-{number}", float(number))
    return register(config, source=source, measured=replace(MEASURED, fid=fid), params={"step": str(number)})


def test_weights_in_local_storage_are_registered_with_a_server(config: Config, tmp_path: Path) -> None:
    check_store(config)
    with opened_store(config):
        pass
    assert publish(config, tmp_path, 1, 20.0).aliases == ("champion",)
    assert publish(config, tmp_path, 2, 21.0).aliases == ("candidate",)
    assert publish(config, tmp_path, 2, 21.0).message.startswith("registered before, ")
    found = champion(config)
    verify_weights(found, found.source)
    assert Path(found.source).is_relative_to(config.storage) and found.params == {"step": "1"}
    name = config.publish.model_name
    assert entries(config, [name])[name].versions[1].source == found.source
    assert status(config).splitlines()[2].endswith(found.source)
    promote(config, 2)
    assert champion(config).version == 2
    assert rollback(config) == 1
    [second, first] = versions_of(open_client(config), name)
    assert second.source == f"runs:/{second.run_id}/model" and first.run_id != second.run_id


def test_a_server_takes_an_address_of_object_storage_as_it_is(config: Config) -> None:
    """With the options that a store of one's own needs, as `register` sends it."""
    client, name = open_client(config), "in-a-bucket"
    client.create_registered_model(name)
    address = "s3://bucket/runs/registry/diffray/0123?endpoint_override=127.0.0.1:9000&scheme=http"
    run = client.create_run("0")
    client.create_model_version(name, source=address, run_id=run.info.run_id)
    assert client.get_model_version(name, "1").source == address
