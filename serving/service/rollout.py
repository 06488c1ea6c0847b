"""Promote and withdraw the candidate by changing the registry's aliases; status of a running rollout."""

from pydantic import BaseModel

from ray_jobs.config import Config, ConfigError
from ray_jobs.registry import aliases
from ray_jobs.registry.models import CANDIDATE, CHAMPION, open_existing, store_errors
from serving.feedback.store import FeedbackTally
from serving.load import DriftScores
from serving.service.canary import Summary

TAKEN_OUT = "taken_out"  # version tag with the reason why it is no longer the candidate


class ShadowCounts(BaseModel):
    """Pairs of images of champion and candidate."""

    stored: int
    passed_over: int


class RolloutStatus(BaseModel):
    """Answer to GET /v1/rollout: champion and candidate, their answers, and people's feedback.

    Versions are named name@version.
    """

    champion: str
    candidate: str | None
    candidate_share: float
    versions: dict[str, Summary]
    quality: dict[str, DriftScores]
    feedback: list[FeedbackTally]
    taken_out: dict[str, str]
    shadow: ShadowCounts
    notice: str | None


def withdraw(config: Config, version: int | None = None, reason: str = "by hand") -> int:
    """Remove the alias `candidate`, tag its version with the reason, and return the version.

    Args:
        version: the version that must have the alias; None: any.

    Raises:
        ConfigError: there is no candidate, or it is another version.
    """
    name = config.publish.model_name
    with store_errors(config):
        client = open_existing(config)
        candidate = aliases.aliases_of(client, config).get(CANDIDATE)
        if candidate is None or version not in (None, candidate):
            raise ConfigError(f"{name!r} has no candidate {version or ''}".rstrip() + "; nothing to withdraw")
        client.set_model_version_tag(name, str(candidate), TAKEN_OUT, reason)
        client.delete_registered_model_alias(name, CANDIDATE)
    return candidate


def take_back(config: Config, version: int, reason: str) -> int:
    """Make the previous version the champion again, and tag the one that it replaces with the reason.

    Args:
        version: the version that must be the champion.

    Raises:
        ConfigError: another version is, or there is no previous one.
    """
    name = config.publish.model_name
    with store_errors(config):
        client = open_existing(config)
        if (champion := aliases.aliases_of(client, config).get(CHAMPION)) != version:
            raise ConfigError(
                f"{name!r}: version {champion} is the champion, not {version}; nothing to take back"
            )
        former = aliases.rollback(config)
        client.set_model_version_tag(name, str(version), TAKEN_OUT, reason)
    return former


def promote(config: Config, version: int | None = None) -> int:
    """Make the candidate, or the given version, the champion, and return it.

    Raises:
        ConfigError: there is no candidate, or its weights differ from the registered ones.
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
