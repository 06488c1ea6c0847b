"""Versions are compared on the base that they were trained on, at their own guidance. A real MLflow."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ray_jobs.compare import look_up
from ray_jobs.config import Config, ConfigError
from ray_jobs.registry.models import open_client, registered, tracking_uri
from ray_jobs.registry.registration import register
from tests.serving.test_registry import MEASURED, named, weights

PARAMS = {"guidance_scale": "3.5", "folds": "0", "dataset": MEASURED.data}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Config]:
    """A run whose storage has a registry, which takes seconds to make."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        yield Config.model_validate(
            {
                "name": "a-run",
                "storage": str(tmp_path_factory.mktemp("runs")),
                "data": {"source": "unused"},
                "model": {"base": "organisation/model", "revision": "main"},
                "search": {"learning_rates": [1e-3], "ladder": [2]},
                "evaluate": {"guidance_scale": 3.5},
            }
        )


@pytest.fixture
def config(run: Config, request: pytest.FixtureRequest) -> Config:
    return named(run, request.node.name.partition("[")[0])


def changed(config: Config, section: str, **values: Any) -> Config:
    """The configuration of another run."""
    return config.model_copy(update={section: getattr(config, section).model_copy(update=values)})


@pytest.mark.parametrize(
    ("field", "value"),
    [("base", "organisation/other"), ("revision", "v2"), ("quantize", "nf4"), ("quantize_text", "int8")],
)
def test_a_version_of_another_base_is_refused_by_the_field_that_differs(
    config: Config, tmp_path: Path, field: str, value: str
) -> None:
    register(config, source=weights(tmp_path / "model", 1.0), measured=MEASURED, params=PARAMS)
    assert look_up(config, "1").name == "version 1"
    refused = f"model.{field}: version 1 was trained with {getattr(config.model, field) or 'null'}, not with"
    with pytest.raises(ConfigError, match=f"^{refused} {value};"):
        look_up(changed(config, "model", **{field: value}), "1")


def test_a_version_trained_on_a_quantized_base_is_not_compared_on_a_plain_one(
    config: Config, tmp_path: Path
) -> None:
    theirs = changed(config, "model", quantize="nf4", quantize_text="int8")
    register(theirs, source=weights(tmp_path / "model", 1.0), measured=MEASURED, params=PARAMS)
    assert look_up(theirs, "1").name == "version 1"
    with pytest.raises(ConfigError, match="^model.quantize: version 1 was trained with nf4, not with null;"):
        look_up(config, "1")


def collect_garbage(config: Config, version: str) -> None:
    """Delete a version's MLflow run for good, as docs/serving.md allows."""
    client = open_client(config)
    run = client.get_model_version(config.publish.model_name, version).run_id
    client.delete_run(run)
    command = [sys.executable, "-m", "mlflow", "gc", "--run-ids", run]
    store = ["--backend-store-uri", tracking_uri(config), "--tracking-uri", tracking_uri(config)]
    quiet = os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true"}
    subprocess.run([*command, *store], check=True, capture_output=True, env=quiet)
    assert not registered(config, version).params


def test_without_its_mlflow_run_a_version_keeps_its_guidance_data_and_folds(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    register(config, source=weights(tmp_path / "plain", 1.0), measured=MEASURED, params=PARAMS)
    with_folds = changed(config, "search", folds=3)
    register(with_folds, source=weights(tmp_path / "folds", 2.0), measured=MEASURED, params={"folds": "3"})
    for version in "12":
        collect_garbage(config, version)
    found = look_up(changed(with_folds, "evaluate", guidance_scale=7.0), "1")
    assert (found.guidance_scale, found.data) == (3.5, MEASURED.data)
    with pytest.raises(
        ConfigError, match="search.folds: version 2 was trained on the validation pictures too"
    ):
        look_up(config, "2")
    assert "does not record" not in capsys.readouterr().out


def test_a_version_of_an_older_release_is_compared_by_its_run_or_as_configured_and_says_so(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    register(config, source=weights(tmp_path / "model", 1.0), measured=MEASURED, params=PARAMS)
    client, name = open_client(config), config.publish.model_name
    for tag in ("folds", "guidance_scale", "data_digest"):
        client.delete_model_version_tag(name, "1", tag)
    other = changed(config, "evaluate", guidance_scale=7.0)
    found = look_up(other, "1")
    assert (found.guidance_scale, found.data) == (3.5, MEASURED.data)
    assert "does not record" not in capsys.readouterr().out
    collect_garbage(config, "1")
    assert look_up(other, "1").guidance_scale == 7.0
    told = "version 1 does not record its evaluate.guidance_scale and search.folds: yours is taken"
    assert told in capsys.readouterr().out
    with pytest.raises(ConfigError, match="search.folds"):
        look_up(changed(config, "search", folds=3), "1")
