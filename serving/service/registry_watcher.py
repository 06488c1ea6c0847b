"""Follow the registry's aliases: a new champion is loaded and warmed up before it gets a request."""

import asyncio
import logging
import time
from dataclasses import dataclass

from ray_jobs.config import Config, ConfigError
from ray_jobs.registry.models import CANDIDATE, CHAMPION, PREVIOUS, RegisteredModel, entries, registered
from ray_jobs.registry.models import champion as look_up
from serving.messages import Placement, base_of, label, placement_of
from serving.schemas import DRAWING_FAILED, APIError
from serving.service.canary import Canary
from serving.service.replica_client import ReplicaClient
from serving.service.routing import Catalogue

FRESH_S = 120  # seconds after which the champion that the application was built with is looked up again
LONGEST_PAUSE_S = 600  # after which a version that was refused time after time is tried again

logger = logging.getLogger("ray.serve")


def is_fresh(built: float) -> bool:
    """Return True if the application was built (seconds since 1970) within the last `FRESH_S` seconds."""
    # `built` may come from another machine, whose clock is ahead of this one.
    return 0 <= time.time() - built < FRESH_S


def current(config: Config, known: RegisteredModel, built: float) -> RegisteredModel:
    """Return the registry's champion; the known one if it is fresh or the registry does not answer."""
    if is_fresh(built):
        return known
    try:
        return look_up(config)
    except Exception as error:  # no answer of the registry may stop the endpoint
        logger.warning("the registry does not answer, so %s is served: %s", label(known), error)
        return known


def replaced_by(config: Config, champion: RegisteredModel) -> RegisteredModel | None:
    """Return the version that a champion replaced, if it has the same base; else None."""
    try:
        previous = registered(config, PREVIOUS)
    except ConfigError:
        return None
    same_base = base_of(previous) == base_of(champion)
    return previous if previous.version != champion.version and same_base else None


async def warmed_up(config: Config, champion: RegisteredModel, replicas: ReplicaClient) -> RegisteredModel:
    """Load and return the first version to serve: the champion, or the one it replaced if it is refused.

    Raises:
        APIError: neither can be served.
    """
    fused = config.serve.fuse_champion
    try:
        await replicas.warm_up(champion, fused=fused)
        return champion
    except APIError as error:
        refused = error.code == "model_refused"
        former = await asyncio.to_thread(replaced_by, config, champion) if refused else None
        if former is None:
            raise
        logger.warning("%s; %s, which it replaced, is served", error.message, label(former))
    await replicas.warm_up(former, fused=fused)
    return former


@dataclass(frozen=True)
class Refusal:
    """A version that the replicas could not load, which takes them minutes to try.

    Attributes:
        pause_s: seconds from this refusal to the next attempt.
        until: time of the next attempt, on the event loop's clock.
    """

    placement: Placement
    reason: str
    pause_s: float
    until: float


class RegistryWatcher:
    """Poll the registry's aliases and update the catalogue.

    An alias that cannot be read or served changes nothing: the last champion stays, and `notice` says why.

    Attributes:
        notice: text for GET /readyz; None if there is nothing to report.
        polled: True once the registry has been read.
    """

    def __init__(self, config: Config, catalogue: Catalogue, replicas: ReplicaClient, canary: Canary) -> None:
        self.config, self.catalogue, self.replicas, self.canary = config, catalogue, replicas, canary
        self.notice: str | None = None
        self.polled = False
        self._lock = asyncio.Lock()
        self._refusals: dict[str, Refusal] = {}  # by alias

    async def run(self, *, now: bool) -> None:
        """Poll the registry until cancelled.

        Args:
            now: poll at once; else after a pause, because the champion was just looked up.
        """
        while True:
            if not now:
                await asyncio.sleep(self.config.serve.follow_s)
            now = False
            try:
                await self.poll()
            except Exception as error:  # no failure may end the polling
                self._set_notice("the registry's aliases were not followed", repr(error))

    async def poll(self) -> None:
        """Read the registry once, and follow its aliases."""
        async with self._lock:
            try:
                read = await asyncio.to_thread(entries, self.config, self.catalogue.models)
            except Exception as error:  # no answer of the registry may stop the endpoint
                self._set_notice("the registry does not answer, so its last known state is used", str(error))
                return
            self.catalogue.entries, self.polled = read, True
            notices = [await self._follow_champion(), await self._follow_candidate(), self._missing_models()]
            self._set_notice("; ".join(filter(None, notices)) or None)

    def _missing_models(self) -> str | None:
        """Return a notice about models of `serve.models` that are not in the registry (yet)."""
        missing = [name for name in self.catalogue.admitted if name not in (*self.catalogue.entries, "*")]
        return f"serve.models: the registry has no {', '.join(map(repr, missing))}" if missing else None

    async def _follow_champion(self) -> str | None:
        """Warm up a new champion and let it answer; return the reason if it cannot."""
        champion = self.catalogue.alias(CHAMPION)
        if champion is None:
            return f"the registry has no champion of {self.catalogue.name!r}; the last one stays"
        former = self.catalogue.champion
        refusal = await self._warm_up(CHAMPION, champion, fused=self.config.serve.fuse_champion)
        if placement_of(champion) == placement_of(former):
            return refusal
        if refusal:
            return f"{refusal}; {label(former)} stays the champion"
        self.catalogue.champion = champion
        logger.info("%s is the champion now, %s before", label(champion), label(former))
        return None

    async def _follow_candidate(self) -> str | None:
        """Warm up the candidate, if it is to be served, and let it answer its share; return the reason if it
        cannot."""
        candidate, settings = self.catalogue.alias(CANDIDATE), self.config.serve
        if (
            candidate is None
            or not (settings.candidate_share or settings.shadow_share)
            or label(candidate) in self.canary.taken_out
            or placement_of(candidate) == placement_of(self.catalogue.champion)
        ):
            self.catalogue.candidate = None
            return None
        refusal = await self._warm_up(CANDIDATE, candidate)
        self.catalogue.candidate = None if refusal else candidate
        return refusal

    async def _warm_up(self, alias: str, version: RegisteredModel, *, fused: bool = False) -> str | None:
        """Have the replicas load a version, unless they have it already; return the reason if they cannot.

        After a refusal they try again only after a pause, each time twice as long.
        """
        if not self.catalogue.fits(version):
            return (
                f"{label(version)} cannot be served: it was trained on {base_of(version)}, and the replicas "
                f"hold another base, {self.catalogue.base}; start the endpoint again"
            )
        placement = placement_of(version, fused=fused)
        refused = self._refusals.pop(alias, None)
        if refused and refused.placement != placement:
            refused = None
        if refused is None or asyncio.get_running_loop().time() >= refused.until:
            try:
                await self.replicas.warm_up(version, fused=fused)
                return None
            except APIError as error:
                reason = error.message
                if error.code == DRAWING_FAILED:  # says of the server what not everyone may read
                    logger.warning("%s: %s", label(version), reason)
                    reason = f"{label(version)} cannot be loaded; the server's log says why"
            except TimeoutError:
                reason = f"{label(version)} is not loaded in time"
            pause_s = min(2 * refused.pause_s, LONGEST_PAUSE_S) if refused else self.config.serve.follow_s
            refused = Refusal(placement, reason, pause_s, asyncio.get_running_loop().time() + pause_s)
        self._refusals[alias] = refused
        return refused.reason

    def _set_notice(self, notice: str | None, reason: str = "") -> None:
        """Set the notice, and log it if it is new, with what may name the registry's place."""
        if notice and notice != self.notice:
            logger.warning("%s%s", notice, f": {reason}" if reason else "")
        self.notice = notice
