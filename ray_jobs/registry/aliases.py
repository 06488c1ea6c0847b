"""Aliases of registry versions: the champion, the candidate, and the previous champion."""

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ray_jobs.config import Config, ConfigError
from ray_jobs.console import columns
from ray_jobs.registry.digests import are_weights
from ray_jobs.registry.models import (
    CANDIDATE,
    CHAMPION,
    PREVIOUS,
    UNEDITED,
    not_ours,
    nothing_published,
    open_existing,
    run_of,
    source_of,
    store_errors,
)
from ray_jobs.registry.promotion import Measured, Result
from ray_jobs.registry.store import retried, versions_of
from ray_jobs.run.records import FID, MEASURES

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

BEGINNING = (
    "base",
    "base_revision",
    "base_quantization",
    "base_text_quantization",
    "begins_from_base",
    "begins_from_adapter",
)  # tags


def promote(config: Config, version: int) -> None:
    """Make a version the champion regardless of its scores, and the former champion `previous`.

    Raises:
        ConfigError: the version does not exist, or its weights are no longer those that were registered.
    """
    with store_errors(config):
        client = open_existing(config)
        aliases = aliases_of(client, config)
        _check_weights(client, config, version)
        make_champion(client, config.publish.model_name, version, aliases)


def rollback(config: Config) -> int:
    """Make `previous` the champion again and return its version.

    The alias `previous` is then deleted, so that a second rollback cannot restore the rejected version.

    Raises:
        ConfigError: there is no previous version, or its weights are missing.
    """
    name = config.publish.model_name
    with store_errors(config):
        client = open_existing(config)
        aliases = aliases_of(client, config)
        if PREVIOUS not in aliases:
            raise ConfigError(
                f"{name!r} has no version with the alias {PREVIOUS!r}: there is nothing to go back to; see "
                f"{command_line('status')} and take {command_line('promote')} --version ..."
            )
        _check_weights(client, config, aliases[PREVIOUS])
        retried(lambda: client.set_registered_model_alias(name, CHAMPION, str(aliases[PREVIOUS])))
        retried(lambda: client.delete_registered_model_alias(name, PREVIOUS))
    return aliases[PREVIOUS]


def status(config: Config) -> str:
    """Format a table of the versions, newest first: scores, how they were measured, and storage location."""
    head = ("version", "aliases", "test FID", "ranked by", "samples", "network", "created (UTC)", "source")
    rows = []
    with store_errors(config):
        client = open_existing(config)
        aliases = aliases_of(client, config)
        for each in sorted(
            versions_of(client, config.publish.model_name), key=lambda each: -int(each.version)
        ):
            measured = measured_of(client, each)
            scores = ("not measured", "–", "–", "–")
            if measured:
                ranked = "FID"
                if (by := measured.ranked_by) != FID and measured.result(by):
                    ranked = f"{MEASURES[by].name} {measured.told(by)}"
                scores = (measured.told(FID), ranked, str(measured.num_samples), measured.feature_network)
            created = time.strftime("%Y-%m-%d %H:%M", time.gmtime(each.creation_timestamp / 1000))
            names = ", ".join(names_of(aliases, int(each.version)))
            rows.append((str(each.version), names, *scores, created, source_of(each)))
    return "\n".join(columns([head, *rows]))


def measured_of(client: "MlflowClient", version: "ModelVersion") -> Measured | None:
    """Read a version's score from its tags and metrics; None if it is not recorded."""
    tags = version.tags
    if not {"feature_network", "num_samples", "data_digest"} <= set(tags):
        return None
    # Versions older than these tags keep the score in their MLflow run, which may have been deleted.
    scores: Mapping[str, float | str] = tags
    if "test_fid" not in tags:
        run = run_of(client, version)
        scores = run.data.metrics if run else {}
    if "test_fid" not in scores:
        return None

    def number(key: str) -> float | None:
        return float(scores[key]) if key in scores else None

    others = {
        name: Result(float(tags[f"test_{name}"]), number(f"test_{name}_error"), number(f"base_test_{name}"))
        for name in MEASURES
        if name != FID and f"test_{name}" in tags
    }
    return Measured(
        fid=float(scores["test_fid"]),
        error=number("test_fid_error"),
        num_samples=int(tags["num_samples"]),
        feature_network=tags["feature_network"],
        data=tags["data_digest"],
        test=tags.get("test_digest"),
        base_fid=float(tags["base_test_fid"]) if "base_test_fid" in tags else None,
        ranked_by=tags.get("ranked_by", FID),
        others=others,
        preference_model=tags.get("preference_model"),
        unedited=Result(float(tags[UNEDITED]), number(f"{UNEDITED}_error")) if UNEDITED in tags else None,
        begins_from=begins_from(version),
        name=f"{version.name}@{version.version}",
    )


def begins_from(version: "ModelVersion") -> str:
    """Return the base, and version or adapter, from which a version was trained, as its tags name them."""
    return " ".join(f"{name}={version.tags.get(name, '')}" for name in BEGINNING)


def aliases_of(client: "MlflowClient", config: Config) -> dict[str, int]:
    """Return the version number of each alias of `config.publish.model_name`.

    Raises:
        ConfigError: nothing was published under that name.
    """
    from mlflow.exceptions import MlflowException

    try:
        found = client.get_registered_model(config.publish.model_name).aliases
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            raise nothing_published(config) from None
        raise
    return {alias: int(version) for alias, version in found.items()}


def names_of(aliases: dict[str, int], version: int) -> tuple[str, ...]:
    """Aliases of a version, sorted."""
    return tuple(sorted(alias for alias, each in aliases.items() if each == version))


def make_champion(client: "MlflowClient", name: str, version: int, aliases: dict[str, int]) -> None:
    """Give a version the alias `champion`, and the former champion `previous`.

    `previous` is set first: after a crash in between there still is a champion, and a second call completes
    the change.

    Args:
        aliases: current aliases, from `aliases_of`.
    """
    former = aliases.get(CHAMPION)
    if former not in (None, version):
        retried(lambda: client.set_registered_model_alias(name, PREVIOUS, str(former)))
    retried(lambda: client.set_registered_model_alias(name, CHAMPION, str(version)))
    if aliases.get(CANDIDATE) == version:
        retried(lambda: client.delete_registered_model_alias(name, CANDIDATE))


def _check_weights(client: "MlflowClient", config: Config, version: int) -> None:
    """Raise ConfigError unless the version exists and its weights are those that were registered."""
    from mlflow.exceptions import MlflowException

    name = config.publish.model_name
    try:
        found = client.get_model_version(name, str(version))
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        raise ConfigError(
            f"--version: {name!r} has no version {version}; see {command_line('status')}"
        ) from None
    if "digest" not in found.tags:
        raise not_ours(config, version)
    if not are_weights(source := source_of(found), found.tags["digest"]):
        raise ConfigError(
            f"{source}: no longer the weights of version {version} of {name!r}, so it cannot be "
            f"served; take another version of {command_line('status')}"
        )


def command_line(name: str, version: int | None = None) -> str:
    """Format the `ray_jobs.versions` command for the user to run."""
    return f"python -m ray_jobs.versions {name} --config ..." + (f" --version {version}" if version else "")
