"""The registry keeps the weights of its versions, and the champion leads back to them."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ray_jobs.config import Config, ConfigError, ControlConfig
from ray_jobs.registry.digests import digest_of_bytes, weights_digest
from ray_jobs.registry.models import champion, entries, open_client, tracking_uri, verify_weights
from ray_jobs.registry.promotion import Measured
from ray_jobs.registry.registration import DECISION, register

MEASURED = Measured(12.5, None, num_samples=96, feature_network="inception@sha256:7ff4", data="9f" * 32)


def named(config: Config, model_name: str) -> Config:
    """`config` with a registry entry of its own."""
    return config.model_copy(update={"publish": config.publish.model_copy(update={"model_name": model_name})})


def weights(folder: Path, value: float) -> str:
    folder.mkdir(exist_ok=True)
    save_file({"weight": torch.full((2,), value)}, folder / "pytorch_lora_weights.safetensors")
    return str(folder)


def test_the_champion_is_what_was_registered(config: Config, tmp_path: Path) -> None:
    config = named(config, "round-trip")
    source = weights(tmp_path / "model", 1.0)
    version = register(config, source=source, measured=MEASURED, params={"step": "20"}).version
    found = champion(config)
    assert (found.name, found.version) == ("round-trip", version)
    assert (found.base, found.base_revision, found.method) == (config.model.base, None, "lora")
    assert found.metrics == {"test_fid": 12.5}
    assert found.digest == weights_digest(source) == weights_digest(found.source)
    assert (found.guidance_scale, found.zero_terminal_snr) == (config.evaluate.guidance_scale, False)


def test_the_registry_says_how_a_version_is_drawn(config: Config, tmp_path: Path) -> None:
    config = named(config, "drawn")
    loss = config.train.loss.model_copy(update={"zero_terminal_snr": True})
    evaluate = config.evaluate.model_copy(update={"guidance_scale": 4.5})
    train = config.train.model_copy(update={"loss": loss})
    config = config.model_copy(update={"train": train, "evaluate": evaluate})
    register(config, source=weights(tmp_path / "model", 1.0), measured=MEASURED, params={})
    found = champion(config)
    assert (found.guidance_scale, found.zero_terminal_snr) == (4.5, True)
    assert entries(config, ["drawn"])["drawn"].versions[found.version].guidance_scale == 4.5
    assert not found.follows_control
    control = config.data.model_copy(update={"control": ControlConfig(kind="edges")})
    config = named(config.model_copy(update={"data": control}), "steered")
    register(config, source=weights(tmp_path / "steered", 2.0), measured=MEASURED, params={})
    assert champion(config).control and champion(config).follows_control


def test_the_champion_outlives_the_folder_that_it_was_registered_from(config: Config, tmp_path: Path) -> None:
    config = named(config, "outlives")
    source = weights(tmp_path / "model", 1.0)
    register(config, source=source, measured=MEASURED, params={})
    shutil.rmtree(source)
    found = champion(config)
    verify_weights(found, found.source)
    assert Path(found.source).is_relative_to(config.storage)


@pytest.mark.parametrize("lost", ["all", "the weights' end", "the card"])
def test_weights_that_the_registry_lost_come_back_with_the_next_registration(
    config: Config, tmp_path: Path, lost: str
) -> None:
    config = named(config, f"lost {lost}")
    source = weights(tmp_path / "model", 1.0)
    (tmp_path / "model" / "README.md").touch()
    first = register(config, source=source, measured=MEASURED, params={})
    kept = Path(champion(config).source)
    if lost == "all":
        shutil.rmtree(kept)
    elif lost == "the card":
        (kept / "README.md").unlink()
    else:
        file = kept / "pytorch_lora_weights.safetensors"
        file.write_bytes(file.read_bytes()[:-1])
    again = register(config, source=source, measured=MEASURED, params={})
    assert (again.version, again.aliases) == (first.version, first.aliases)
    assert f"its files, which were not whole, are in {kept} again" in again.message
    found = champion(config)
    verify_weights(found, str(kept))
    assert found.source == str(kept) and (kept / "README.md").exists()
    assert "again" not in register(config, source=source, measured=MEASURED, params={}).message


@pytest.mark.parametrize("older", [False, True])
def test_a_version_whose_weights_were_kept_elsewhere_finds_them_again(
    config: Config, tmp_path: Path, older: bool
) -> None:
    """In another storage, or by a release whose digest was one of bytes and so named another folder."""
    source = weights(tmp_path / "model", 1.0)
    publish = config.publish.model_copy(
        update={"model_name": f"elsewhere {older}", "tracking_uri": tracking_uri(config)}
    )
    config = config.model_copy(update={"publish": publish})
    client = open_client(config)
    client.create_registered_model(publish.model_name)
    tags = {"base": "b", "base_revision": "", "method": "lora", DECISION: "champion"}
    tags |= {"digest": digest_of_bytes(source)} if older else {"digest": weights_digest(source)}
    client.create_model_version(publish.model_name, source=str(tmp_path / "gone"), tags=tags)
    registered = register(config, source=source, measured=MEASURED, params={})
    found = entries(config, [publish.model_name])[publish.model_name].versions[1]
    assert registered.version == 1 and Path(found.source).is_relative_to(config.storage)
    verify_weights(found, found.source)


def test_a_storage_of_any_name_holds_its_registry(config: Config, tmp_path: Path) -> None:
    """A `?` begins the options of a URL, a `#` its fragment, a `%` an escape."""
    place = tmp_path / "runs#1? 50%25 'a'"
    config = config.model_copy(update={"storage": str(place)})
    register(config, source=weights(tmp_path / "model", 1.0), measured=MEASURED, params={"a": "1"})
    found = champion(config)
    assert found.source.startswith(f"{place}/registry/")
    assert (place / "mlflow.db").exists()
    assert list(tmp_path.rglob("*.db")) == [place / "mlflow.db"]


def test_a_folder_without_weights_is_refused(config: Config, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no safetensors"):
        register(config, source=str(tmp_path), measured=MEASURED, params={})


def test_a_model_that_was_never_registered_is_named_with_the_command_to_run(config: Config) -> None:
    with pytest.raises(ConfigError, match=r"no champion of 'unheard-of'; run the pipeline first"):
        champion(named(config, "unheard-of"))


def test_a_missing_registry_is_not_created_by_reading(config: Config, tmp_path: Path) -> None:
    config = config.model_copy(update={"storage": str(tmp_path / "empty")})
    with pytest.raises(ConfigError, match="run the pipeline first"):
        champion(config)
    assert not (tmp_path / "empty").exists()


def test_a_remote_storage_needs_a_tracking_uri(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    remote = config.model_copy(update={"storage": "s3://bucket/runs"})
    with pytest.raises(ConfigError, match="publish.tracking_uri: missing"):
        tracking_uri(remote)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    assert tracking_uri(remote) == "http://mlflow:5000"


def test_the_digest_follows_content_not_place(tmp_path: Path) -> None:
    assert weights_digest(weights(tmp_path / "a", 1.0)) == weights_digest(weights(tmp_path / "b", 1.0))
    assert weights_digest(weights(tmp_path / "a", 2.0)) != weights_digest(weights(tmp_path / "b", 1.0))


def test_weights_that_changed_after_registering_are_refused(config: Config, tmp_path: Path) -> None:
    config = named(config, "changed")
    source = weights(tmp_path / "model", 1.0)
    register(config, source=source, measured=MEASURED, params={})
    verify_weights(champion(config), source)
    weights(tmp_path / "model", 2.0)
    with pytest.raises(ConfigError, match="not the weights registered as version 1"):
        verify_weights(champion(config), source)
