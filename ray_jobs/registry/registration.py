"""Registration: a folder of weights becomes a version, and the champion if its score allows it.

Called by `publish` and `import_weights`. `ray_jobs/versions.py` describes the aliases.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from cluster.storage import Storage
from ray_jobs.config import Config, ModelConfig, TrainConfig
from ray_jobs.registry.aliases import (
    aliases_of,
    begins_from,
    command_line,
    make_champion,
    measured_of,
    names_of,
)
from ray_jobs.registry.beginning import beginning_names
from ray_jobs.registry.digests import digest_of_bytes, is_copy, weights_digest
from ray_jobs.registry.models import (
    CANDIDATE,
    CHAMPION,
    CONTROL_TAG,
    PREVIOUS,
    UNEDITED,
    WEIGHTS,
    open_client,
    source_of,
    store_errors,
    tracking_uri,
)
from ray_jobs.registry.promotion import Measured, Paired, Result, compared_by, objection, objection_to_first
from ray_jobs.registry.provenance import code_version, signature
from ray_jobs.registry.store import ATTEMPTS, experiment_id, is_server, retried, versions_of
from ray_jobs.run.folder import SharedFolder
from ray_jobs.run.records import FID, MEASURES

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

DECISION = "decision"  # tag; written last, so that an interrupted registration is detected and completed


@dataclass(frozen=True)
class Registered:
    """Outcome of a registration: the version, its current aliases, and the reason, for display."""

    version: int
    aliases: tuple[str, ...]
    message: str


def register(
    config: Config,
    *,
    source: str,
    measured: Measured | None,
    params: dict[str, str],
    metrics: dict[str, float] | None = None,
    description: str | None = None,
    paired: Paired | None = None,
    tags: Mapping[str, str] | None = None,
) -> Registered:
    """Register `source` as a version of `config.publish.model_name`, and as champion if its score allows it.

    The weights are copied to `<storage>/registry/`, so that a champion survives its run's next result.
    Weights that are already registered keep their version, aliases and metrics; their copy is written again
    if it is missing or damaged.

    Args:
        source: folder (local path or URI) in diffusers format, with safetensors weights.
        measured: its test score; None for weights that were trained elsewhere and not measured. Such a
            version becomes champion only where there is none.
        params: parameters logged with the run, for example the learning rate.
        metrics: metrics logged with the run in addition to `test_fid` and `test_fid_error`.
        description: description of the version, for display.
        paired: paired comparison with a champion, if both were scored on the same captions and noise.
        tags: further tags of the version.

    Raises:
        ConfigError: the folder holds no weights, or the registry refuses or cannot be reached.
    """
    name, digest = config.publish.model_name, weights_digest(source)
    with store_errors(config):
        client = open_client(config)
        _ensure_model(client, name)
        present = versions_of(client, name)
        # Before all that takes time: what becomes champion meanwhile is a rival, see `_settled`.
        before = set(_champions(present))
        found, restored = _registered(present, source, digest), ""
        if found is not None and not is_copy(source_of(found), source, found.tags["digest"]):
            restored = _restore(client, config, found, source, digest)
        if found is not None and DECISION in found.tags:
            aliases = names_of(aliases_of(client, config), int(found.version))
            now = f"its aliases now: {', '.join(aliases) or 'none'}"
            message = f"registered before, {found.tags[DECISION]}; {restored}{now}"
            return Registered(int(found.version), aliases, message)
        if found is None:
            kept = _keep(config, source, digest)
            run = _log_run(client, config, measured, params, metrics or {})
            place, own = kept, _tags(config, measured, digest) | dict(tags or {})
            if is_server(tracking_uri(config)) and Storage.open(kept).is_local:
                # A server refuses a local folder as a version's source, unless it belongs to the run.
                place, own = f"runs:/{run}/model", own | {WEIGHTS: kept}
            found = retried(
                lambda: client.create_model_version(
                    name, source=place, run_id=run, tags=own, description=description
                )
            )
        return _settled(client, config, _decide(client, config, int(found.version), measured, paired), before)


def _registered(versions: list["ModelVersion"], source: str, digest: str) -> "ModelVersion | None":
    """Return the newest version of these weights, or None."""
    same = [each for each in versions if each.tags.get("digest") == digest]
    # Older releases computed the digest over the files' bytes, and did not yet store the score as a tag.
    older = [each for each in versions if "digest" in each.tags and "test_fid" not in each.tags]
    if older and not same:
        former = digest_of_bytes(source)
        same = [each for each in older if each.tags["digest"] == former]
    return max(same, key=lambda each: int(each.version), default=None)


def _decide(
    client: "MlflowClient",
    config: Config,
    version: int,
    measured: Measured | None,
    paired: Paired | None = None,
) -> Registered:
    """Give a new version its alias, then record the decision in its tag."""
    name, aliases = config.publish.model_name, aliases_of(client, config)
    champion = aliases.get(CHAMPION)
    against: str | None = None
    better = ""
    if champion == version:
        decision = "champion"
    elif champion is None:
        against = objection_to_first(measured) if measured else None
        decision = "champion: the first version of its name" + ("" if measured else ", not measured")
    elif measured is None:
        against = "it is not measured"
        decision = ""
    else:
        own = client.get_model_version(name, str(version))
        measured = replace(measured, begins_from=begins_from(own))
        held = measured_of(client, client.get_model_version(name, str(champion)))
        against = objection(measured, held, paired if paired and paired.champion == champion else None)
        measure = compared_by(measured, held) if held else FID
        score = f"its test {MEASURES[measure].name} {measured.told(measure)}"
        better = f"{score} beats that of version {champion}"
        decision = f"champion: {better}, now {PREVIOUS}"
    if config.publish.release == "canary" and champion not in (None, version):
        return _released(client, name, version, better, against)
    if against:
        decision = (
            f"stays candidate: {against}; to promote it all the same: {command_line('promote', version)}"
        )
        retried(lambda: client.set_registered_model_alias(name, CANDIDATE, str(version)))
    else:
        make_champion(client, name, version, aliases)
    retried(lambda: client.set_model_version_tag(name, str(version), DECISION, decision))
    return Registered(version, names_of(aliases_of(client, config), version), decision)


def _released(
    client: "MlflowClient", name: str, version: int, better: str, against: str | None
) -> Registered:
    """Make a new version the candidate, or hold it back, and record why (`publish.release: canary`).

    Args:
        better, against: what speaks for it, and what against it, as sentences.
    """
    if against:
        decision = f"held back: {against}; to promote it all the same: {command_line('promote', version)}"
    else:
        decision = f"candidate: {better}"
        retried(lambda: client.set_registered_model_alias(name, CANDIDATE, str(version)))
    retried(lambda: client.set_model_version_tag(name, str(version), DECISION, decision))
    return Registered(version, (CANDIDATE,) if not against else (), decision)


def _settled(client: "MlflowClient", config: Config, decided: Registered, before: set[int]) -> Registered:
    """Return the decision, corrected if another run made its version the champion at the same time.

    MLflow has no lock: each of two runs may have seen no champion, or replaced one that it never compared
    with. But each writes its alias, then its decision, and then reads the other's, so at least one of them
    sees both. Every run reaches the same result: the earlier version stays unless the later one beats it.

    Args:
        before: versions that had already been made champion when the registration began.
    """
    name, version = config.publish.model_name, decided.version
    best = version
    for _ in range(ATTEMPTS):
        made = _champions(versions_of(client, name))
        if version not in made or not set(made) - before - {version}:
            return decided
        rivals = sorted(set(made) - before | {version})
        best, former = _best(client, [made[each] for each in rivals])
        aliases = aliases_of(client, config)
        if aliases.get(CHAMPION) == best and former in (None, aliases.get(PREVIOUS)):
            break
        former_aliases = {alias: number for alias, number in aliases.items() if alias != CHAMPION}
        make_champion(client, name, best, former_aliases | ({CHAMPION: former} if former else {}))
        if aliases.get(PREVIOUS) == best and former is None:
            retried(partial(client.delete_registered_model_alias, name, PREVIOUS))
        beaten = [each for each in rivals if each not in (best, former)]
        if beaten:
            retried(partial(client.set_registered_model_alias, name, CANDIDATE, str(beaten[-1])))
    message = decided.message
    if best != version:
        message = f"stays candidate: it does not beat version {best}, which was registered at the same time"
        retried(lambda: client.set_model_version_tag(name, str(version), DECISION, message))
    return Registered(version, names_of(aliases_of(client, config), version), message)


def _best(client: "MlflowClient", versions: list["ModelVersion"]) -> tuple[int, int | None]:
    """Return the champion among versions registered at the same time, and the version that it replaced."""
    best, former = versions[0], None
    for each in versions[1:]:
        measured = measured_of(client, each)
        if measured and not objection(measured, measured_of(client, best)):
            best, former = each, best
    return int(best.version), int(former.version) if former else None


def _champions(versions: list["ModelVersion"]) -> dict[int, "ModelVersion"]:
    """Versions that were made champion at their registration, by number."""
    return {int(each.version): each for each in versions if each.tags.get(DECISION, "").startswith(CHAMPION)}


def quantization_tags(model: ModelConfig) -> dict[str, str]:
    """Return tags that say how the base was stored; a version of a plain one has none."""
    tags = {"base_quantization": model.quantize, "base_text_quantization": model.quantize_text}
    return {name: stored for name, stored in tags.items() if stored}


def beginning_tags(config: Config) -> dict[str, str]:
    """Return tags of the version or adapter that training began from; a version of a plain base has none."""
    return {f"begins_from_{field}": name for field, name in beginning_names(config).items()}


def training_tags(train: TrainConfig) -> dict[str, str]:
    """Return tags of what a training makes of weights, which a search may decide."""
    return {"method": train.makes, "zero_terminal_snr": str(train.loss.zero_terminal_snr).lower()}


def _tags(config: Config, measured: Measured | None, digest: str) -> dict[str, str]:
    """Return a version's tags."""
    tags = {
        "base": config.model.base,
        "base_revision": config.model.revision or "",
        **quantization_tags(config.model),
        **training_tags(config.train),
        "digest": digest,
        "config_digest": hashlib.sha256(config.to_yaml().encode()).hexdigest(),  # digest of config.yaml
        "code_version": code_version(),
        "signature": json.dumps(signature(config.data.resolution)),
    }
    if config.data.reference_resolution:
        tags["reference_resolution"] = str(config.data.reference_resolution)
    if measured is None:
        return tags
    return tags | {
        **beginning_tags(config),
        "data_digest": measured.data,
        **({} if measured.test is None else {"test_digest": measured.test}),
        **({} if measured.base_fid is None else {"base_test_fid": repr(measured.base_fid)}),
        "feature_network": measured.feature_network,
        "num_samples": str(measured.num_samples),
        "test_fid": repr(measured.fid),
        **({} if measured.error is None else {"test_fid_error": repr(measured.error)}),
        "ranked_by": measured.ranked_by,
        **({"preference_model": measured.preference_model} if measured.preference_model else {}),
        **_other_scores(measured),
        **_unedited(measured.unedited),
        **({CONTROL_TAG: "true"} if config.train.method == "lora" and config.data.has_control else {}),
        "guidance_scale": f"{config.evaluate.guidance_scale:g}",
        "folds": str(config.search.folds),
    }


def _unedited(found: Result | None) -> dict[str, str]:
    """Return tags of `Measured.unedited`, which `aliases.measured_of` reads."""
    told = {} if found is None else {"": found.value, "_error": found.error}
    return {f"{UNEDITED}{suffix}": repr(value) for suffix, value in told.items() if value is not None}


def _other_scores(measured: Measured) -> dict[str, str]:
    """Return tags of the scores beside FID that can rank, which `aliases.measured_of` reads."""
    named = {
        key: value
        for name, found in measured.others.items()
        for key, value in (
            (f"test_{name}", found.value),
            (f"test_{name}_error", found.error),
            (f"base_test_{name}", found.base),
        )
    }
    return {key: repr(value) for key, value in named.items() if value is not None}


def _restore(
    client: "MlflowClient", config: Config, version: "ModelVersion", source: str, digest: str
) -> str:
    """Copy a version's weights to the registry again, since its folder lacks them; say so, for display."""
    kept = _keep(config, source, digest)
    if kept != source_of(version):  # registered from another storage, or by an older release
        retried(lambda: client.set_model_version_tag(version.name, version.version, WEIGHTS, kept))
    return f"its files, which were not whole, are in {kept} again; "


def _keep(config: Config, source: str, digest: str) -> str:
    """Copy the weights to a folder named after their digest, unless it holds them; return its URI."""
    # A URI has no spaces; the digest keeps folders distinct.
    folder = re.sub("[^A-Za-z0-9._-]", "-", config.publish.model_name)
    models, kept = SharedFolder.of(config).registered(folder), digest[:16]
    place = models.child(kept).uri
    if is_copy(place, source, digest):
        return place
    origin = Storage.open(source)
    local = origin.local_copy()
    models.upload(local, kept)
    if not origin.is_local:
        shutil.rmtree(local.parent)  # the download
    return place


def _log_run(
    client: "MlflowClient",
    config: Config,
    measured: Measured | None,
    params: dict[str, str],
    metrics: dict[str, float],
) -> str:
    """Log one finished MLflow run and return its id."""
    from mlflow.entities import Metric, Param

    scores = {"test_fid": measured.fid} if measured else {}
    if measured and measured.error is not None:
        scores["test_fid_error"] = measured.error
    # Restore an experiment that was deleted since the start, so that the trained result is not lost.
    experiment = experiment_id(client, config.name, restore=True)
    run = retried(lambda: client.create_run(experiment, run_name=config.name))
    now = run.info.start_time
    log = partial(
        client.log_batch,
        run.info.run_id,
        params=[Param(key, str(value)) for key, value in params.items()],
        metrics=[Metric(key, float(value), now, 0) for key, value in {**metrics, **scores}.items()],
    )
    retried(log)
    retried(lambda: client.set_terminated(run.info.run_id))
    return str(run.info.run_id)


def _ensure_model(client: "MlflowClient", name: str) -> None:
    """Create the registered model unless it exists."""
    from mlflow.exceptions import MlflowException

    try:
        retried(lambda: client.create_registered_model(name))
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
