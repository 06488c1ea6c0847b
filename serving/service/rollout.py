"""Promote and withdraw the candidate, by the aliases of the registry."""

from ray_jobs.config import Config, ConfigError
from ray_jobs.registry import aliases
from ray_jobs.registry.models import CANDIDATE, open_existing, store_errors

TAKEN_OUT = "taken_out"  # tag of a version: why it is the candidate no more


def withdraw(config: Config, version: int | None = None, reason: str = "by hand") -> int:
    """Take the alias `candidate` away and note why; returns the version that had it.

    Args:
        version: only if this one has the alias.

    Raises:
        ConfigError: there is no candidate, or it is another version.
    """
    name = config.publish.model_name
    with store_errors(config):
        client = open_existing(config)
        candidate = aliases.aliases_of(client, config).get(CANDIDATE)
        if candidate is None or version not in (None, candidate):
            raise ConfigError(f"{name!r} has no candidate {version or ''}".rstrip() + "; nothing to take out")
        client.set_model_version_tag(name, str(candidate), TAKEN_OUT, reason)
        client.delete_registered_model_alias(name, CANDIDATE)
    return candidate


def promote(config: Config, version: int | None = None) -> int:
    """Make the candidate, or the version named, the champion, and return it.

    Raises:
        ConfigError: there is no candidate, or its weights are not those that were registered.
    """
    if version is None:
        with store_errors(config):
            version = aliases.aliases_of(open_existing(config), config).get(CANDIDATE)
        if version is None:
            raise ConfigError(
                f"{config.publish.model_name!r} has no candidate; name a version: promote --version ..."
            )
    aliases.promote(config, version)
    return version
