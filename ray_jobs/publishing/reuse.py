"""Reuse of an earlier publishing: what it settled, and what has changed since."""

from ray_jobs.config import Config, ConfigError, Effect, Settings
from ray_jobs.console import say
from ray_jobs.publishing.final_scores import settings_of
from ray_jobs.publishing.test_split_ledger import PUBLISHED, read_records
from ray_jobs.publishing.version import register_winner, sampled_as
from ray_jobs.registry.digests import has_files_of, is_copy
from ray_jobs.registry.models import registered, shown_uri
from ray_jobs.run.folder import REPORT, RunFolder
from ray_jobs.run.records import WINNER, Winner

# Registering again measures nothing, and weights that are registered keep their version.
REGISTRY = ("publish.model_name", "publish.tracking_uri")


def publish_settings(config: Config) -> Settings:
    """Return the settings of the registry and the report; stored in winner.json."""
    own = {f"publish.{name}": value for name, value in config.publish.affecting(Effect.PUBLISHING).items()}
    price = config.search.device_hour_price  # without search.max_cost it only shows in the report
    return own | {"publish.tracking_uri": shown_uri(config), "search.device_hour_price": price}


def reuse(config: Config, data: str, search_digest: str) -> Winner | None:
    """Return the published winner of a search, if there is one.

    It is registered again if the configuration names another model or registry, or the registry has lost the
    version or its weights. Other changes need new measurements or pictures, and are only announced.

    Args:
        data: digest of the prepared data.

    Raises:
        ConfigError: the registry refuses, or the folder of the model no longer holds its weights.
    """
    run = RunFolder.of(config)
    if not (run.root.exists(WINNER) and run.root.exists(REPORT)):
        return None
    winner = Winner.read(run.root)
    if winner.search_digest != search_digest:
        return None
    before, now = winner.publish_settings, publish_settings(config)
    moved = any(before.get(name) != now[name] for name in REGISTRY)  # earlier releases did not record them
    if moved or not _is_registered(config, run, winner):
        winner = _register_again(config, run, winner, data)
    if not (changed := _changed(config, winner)):
        say("publish", f"unchanged, skipped: version {winner.registry_version}")
        return winner
    say(
        "publish",
        f"skipped: version {winner.registry_version}, but {', '.join(changed)} changed since it was measured "
        "and reported; --force does that again, and reads the test split again",
    )
    return winner


def _changed(config: Config, winner: Winner) -> list[str]:
    """Return the settings that have changed since the scores were computed and the report was written."""
    measured = winner.measure_settings
    now = settings_of(config.evaluate).items()
    changed = [f"evaluate.{name}" for name, value in now if measured.get(name) != value]
    shown = {name: value for name, value in publish_settings(config).items() if name not in REGISTRY}
    before = winner.publish_settings
    return changed + [name for name, value in shown.items() if before.get(name, value) != value]


def _published(run: RunFolder) -> str | None:
    """Return the digest of the weights that the run published last; None if it records none."""
    published = [str(each["weights"]) for each in read_records(run.root) if each["event"] == PUBLISHED]
    return published[-1] if published else None


def _is_registered(config: Config, run: RunFolder, winner: Winner) -> bool:
    """Return whether the registry has the published version, with all its files.

    Their content, which may be gigabytes in a bucket, is only read if an older release registered it, under
    another digest.
    """
    try:
        held = registered(config, str(winner.registry_version))
    except ConfigError:
        return False  # if the registry refuses, registering again says so
    if not has_files_of(held.source, run.model.uri):
        return False
    published = _published(run)
    return published in (None, held.digest) or is_copy(held.source, run.model.uri, published)


def _register_again(config: Config, run: RunFolder, winner: Winner, data: str) -> Winner:
    """Register the published weights as the configuration says now; the report keeps the first version."""
    published = _published(run)
    if published is None or not is_copy(run.model.uri, run.model.uri, published):
        raise ConfigError(
            f"{run.model.uri}: does not hold the weights that {WINNER} describes; publish again with "
            "--force, which reads the test split again"
        )
    # Without a comparison in pairs of pictures, which would load the test split.
    added = register_winner(sampled_as(config, winner), winner, data, run.model.uri, None)
    winner |= {"registry_version": added.version, "registry_decision": added.message}
    changed = {name: value for name, value in publish_settings(config).items() if name in REGISTRY}
    winner |= {"publish_settings": publish_settings(config) | winner.publish_settings | changed}
    winner.write(run.root)
    say("publish", f"{config.publish.model_name} version {added.version}, {added.message}")
    return winner
