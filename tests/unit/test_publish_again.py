"""A winner that is published already: what is done again, and what is only announced."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from ray_jobs.config import Config, ConfigError
from ray_jobs.publishing.final_scores import settings_of
from ray_jobs.publishing.reuse import publish_settings, reuse
from ray_jobs.publishing.test_split_ledger import close_test, open_test, read_records
from ray_jobs.publishing.version import register_winner
from ray_jobs.registry.digests import weights_digest
from ray_jobs.registry.models import champion, open_client, verify_weights
from ray_jobs.run.folder import REPORT, RunFolder
from ray_jobs.run.records import Winner
from tests.unit.test_report import WINNER

DATA, SEARCH = "data", "search"


def configured(storage: Path, **sections: Any) -> Config:
    return Config.model_validate(
        {
            "name": "again",
            "storage": str(storage),
            "data": {"source": "unused"},
            "model": {"base": "unused"},
            "search": {"learning_rates": [1e-3], "ladder": [2], **sections.pop("search", {})},
            **sections,
        }
    )


@pytest.fixture(scope="module")
def new_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database without entries, which takes seconds to make."""
    folder = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        open_client(configured(folder)).search_registered_models()
    return folder / "mlflow.db"


@pytest.fixture
def published(tmp_path: Path, new_store: Path) -> Config:
    """A run as publish leaves it: version 2 of its name."""
    shutil.copy(new_store, tmp_path)
    config = configured(tmp_path)
    run = RunFolder.of(config)
    write_weights(config, 1.0)
    digest = weights_digest(run.model.uri)
    open_test(run.root, digest, DATA, forced=False)
    close_test(run.root, digest, DATA)
    run.root.write_text(REPORT, "the report")
    winner = Winner.model_validate(WINNER | {"search_digest": SEARCH})
    client = open_client(config)
    client.create_registered_model(config.publish.model_name)
    client.create_model_version(config.publish.model_name, source="another's")
    registered = register_winner(config, winner, DATA, run.model.uri, None)
    settings = {
        "registry_version": registered.version,
        "measure_settings": settings_of(config.evaluate),
        "publish_settings": publish_settings(config),
    }
    (winner | settings).write(run.root)
    return config


def write_weights(config: Config, value: float) -> None:
    folder = Path(RunFolder.of(config).model.uri)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"weight": np.full(3, value, np.float32)}, folder / "pytorch_lora_weights.safetensors")


def test_unchanged_it_is_skipped_and_of_another_search_it_is_no_result(
    published: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    winner = reuse(published, DATA, SEARCH)
    assert winner and winner.registry_version == 2
    assert "unchanged, skipped: version 2" in capsys.readouterr().out
    assert reuse(published, DATA, "another search") is None


def test_under_another_name_it_is_registered_without_reading_the_test_split(
    published: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    renamed = configured(tmp_path, publish={"model_name": "renamed"})
    reads = read_records(RunFolder.of(published).root)
    winner = reuse(renamed, DATA, SEARCH)
    assert winner and winner.registry_version == 1
    held = champion(renamed)
    assert held.version == 1 and weights_digest(held.source) == reads[-1]["weights"]
    assert "renamed version 1, champion" in capsys.readouterr().out
    assert reuse(renamed, DATA, SEARCH) == winner == Winner.read(RunFolder.of(renamed).root)
    assert "unchanged, skipped: version 1" in capsys.readouterr().out
    assert read_records(RunFolder.of(renamed).root) == reads


def test_only_the_weights_that_were_measured_are_registered(published: Config, tmp_path: Path) -> None:
    write_weights(published, 2.0)
    with pytest.raises(ConfigError, match="does not hold the weights that winner.json describes; .* --force"):
        reuse(configured(tmp_path, publish={"model_name": "renamed"}), DATA, SEARCH)


@pytest.mark.parametrize(
    "changed",
    [
        {"publish": {"sample_count": 3}},
        {"search": {"device_hour_price": 2.0}},
        {"evaluate": {"memorisation_pictures": 7}},
    ],
)
def test_what_needs_new_pictures_or_scores_is_announced(
    published: Config, tmp_path: Path, changed: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert reuse(configured(tmp_path, **changed), DATA, SEARCH) == reuse(published, DATA, SEARCH)
    [(section, values)] = changed.items()
    said = capsys.readouterr().out
    assert f"skipped: version 2, but {section}.{next(iter(values))} changed since" in said


@pytest.mark.parametrize("lost", ["weights", "part of the weights", "version", "database"])
def test_what_the_registry_lost_is_registered_again_without_reading_the_test_split(
    published: Config, new_store: Path, lost: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunFolder.of(published)
    kept = Path(champion(published).source)
    reads = read_records(run.root)
    if lost == "weights":
        shutil.rmtree(kept)
    elif lost == "part of the weights":
        file = kept / "pytorch_lora_weights.safetensors"
        file.write_bytes(file.read_bytes()[:-1])
    elif lost == "version":
        open_client(published).delete_model_version(published.publish.model_name, "2")
    else:
        shutil.copy(new_store, published.storage)
    winner = reuse(published, DATA, SEARCH)
    held = champion(published)
    assert winner and winner == Winner.read(run.root) and winner.registry_version == held.version
    assert held.version == {"version": 3, "database": 1}.get(lost, 2)
    verify_weights(held, str(kept))
    assert ("registered before" in capsys.readouterr().out) == (lost not in ("version", "database"))
    assert read_records(run.root) == reads
    assert reuse(published, DATA, SEARCH) == winner
    assert f"unchanged, skipped: version {held.version}" in capsys.readouterr().out


def test_weights_that_are_nowhere_any_more_are_published_again_only_by_force(published: Config) -> None:
    shutil.rmtree(champion(published).source)
    shutil.rmtree(RunFolder.of(published).model.uri)
    with pytest.raises(ConfigError, match="does not hold the weights that winner.json describes; .* --force"):
        reuse(published, DATA, SEARCH)
