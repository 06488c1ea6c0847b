"""Handle requests: choose the version, plan one request per image, and have the replicas generate them."""

import asyncio
import base64
import logging
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing, contextmanager
from functools import partial
from itertools import count

from sqlalchemy.exc import SQLAlchemyError

from ray_jobs.config import Config
from ray_jobs.registry.models import CHAMPION, PREVIOUS, RegisteredModel
from ray_jobs.run.folder import RunFolder
from serving.feedback.store import Compared, FeedbackStore, FeedbackTally
from serving.load import DriftScores
from serving.messages import BASE, ReplicaLoad, RoutedRequest, label
from serving.schemas import (
    APIError,
    CompletedEvent,
    ImageEvent,
    ImageRequest,
    ImageResponse,
    PartialImageEvent,
    shown_quality,
)
from serving.service.background import Background
from serving.service.canary import Canary, Limits
from serving.service.given_files import NO_FILES, GivenFiles
from serving.service.jobs import Jobs
from serving.service.metrics import Metrics
from serving.service.picture_links import PictureLinks
from serving.service.quality import Quality
from serving.service.registry_watcher import RegistryWatcher
from serving.service.replica_client import ReplicaClient
from serving.service.request_context import RequestContext
from serving.service.request_planner import RequestPlanner
from serving.service.responses import Delivery, choices_of
from serving.service.rollout import RolloutStatus, ShadowCounts, promote, take_back, withdraw
from serving.service.routing import Catalogue
from serving.service.shadow import Shadow
from serving.service.webhooks import Webhooks

logger = logging.getLogger("ray.serve")

DAY_S = 24 * 3600
CLEANING_S = 600  # pause between deletions of what has expired, in seconds


class Service:
    """The endpoint without HTTP. Use it from one event loop only.

    Args:
        config: configuration of the run whose model is served.
        champion: the first version to answer requests.
        replicas: client of the replicas, which generate the images.
        feedback: store that records how every image was generated.
    """

    def __init__(
        self, config: Config, champion: RegisteredModel, replicas: ReplicaClient, feedback: FeedbackStore
    ) -> None:
        self.config, self.settings, self.replicas = config, config.serve, replicas
        self.feedback = feedback
        settings = config.serve
        self.catalogue = Catalogue(champion.name, champion, settings.models, settings.candidate_share)
        limits = Limits(settings.rollback_requests, settings.rollback_error_rate, settings.rollback_latency)
        self.canary = Canary(limits)
        self.quality = Quality(settings.rollback_feedback, settings.promote_feedback, settings.rollback_drift)
        self.metrics = Metrics(
            max_queued_requests=settings.max_queued_requests, min_replicas=settings.min_replicas
        )
        self.watcher = RegistryWatcher(config, self.catalogue, replicas, self.canary)
        self.shadow = Shadow(
            RunFolder.of(config).shadow,
            self._draw_shadow,
            lambda: self.num_open < settings.max_batch_size / 2,
        )
        self.planner = RequestPlanner(settings, self.catalogue, self.watcher, replicas)
        self.links = PictureLinks(
            RunFolder.of(config).pictures, partial(feedback.secret, "pictures"), settings.url_minutes
        )
        self.delivery = Delivery(
            self.catalogue,
            feedback,
            self.metrics,
            self.shadow,
            settings.shadow_share,
            self.links,
            settings.public_url,
        )
        self.jobs = Jobs(
            feedback.jobs,
            RunFolder.of(config).jobs,
            self.generate,
            Webhooks(partial(feedback.secret, "webhooks"), allow_private=settings.private_webhooks),
            settings,
        )
        self.started = int(time.time())
        self.num_open = 0  # open requests
        self.background = Background()
        self._named: Sequence[object] = ()  # state of the registry that the metrics last received

    def start(self, *, poll_now: bool) -> None:
        """Start following the registry and, if configured, shadow mode.

        Args:
            poll_now: read the registry at once instead of after a pause.
        """
        self.background.start(self.watcher.run(now=poll_now))
        self.background.start(self._clean())
        self.background.start(self.jobs.run())
        if self.settings.shadow_share:
            self.background.start(self.shadow.run())
        if self.quality != Quality(0.0):
            self.background.start(self._watch_quality())

    async def generate(
        self,
        request: ImageRequest,
        context: RequestContext,
        files: GivenFiles = NO_FILES,
        timeout_s: float | None = None,
    ) -> ImageResponse:
        """Generate `n` images of a prompt.

        Args:
            files: those of an EditRequest.
            timeout_s: maximum duration, in seconds; None: the server's for requests.
            context: facts about the HTTP request. Its key selects the version if the request names no user;
                facts about the images are added for the log.

        Raises:
            APIError: the error to send to the client.
        """
        seconds = timeout_s or self.settings.request_timeout_s
        deadline = asyncio.get_running_loop().time() + seconds
        with self._slot(), self._in_time(seconds):
            async with asyncio.timeout_at(deadline):
                planned = await self._plan(request, context, files)
            with self._counted(planned[0]):
                async with asyncio.timeout_at(deadline):
                    pictures = await self.replicas.draw(planned)
            data = await self.delivery.deliver(request, planned, pictures, context)
        return ImageResponse(
            created=int(time.time()),
            data=data,
            model=label(planned[0].version),
            adapters=choices_of(planned[0]),
            size=pictures[0].size,
            output_format=request.output_format,
            quality=shown_quality(request),
            safety_identifier=request.user,
        )

    async def check(
        self,
        request: ImageRequest,
        context: RequestContext,
        files: GivenFiles = NO_FILES,
    ) -> None:
        """Raise APIError for a request that cannot be planned; nothing is drawn."""
        with self._in_time(self.settings.request_timeout_s):
            async with asyncio.timeout(self.settings.request_timeout_s):
                await self._plan(request, context, files)

    async def stream(
        self,
        request: ImageRequest,
        context: RequestContext,
        files: GivenFiles = NO_FILES,
    ) -> AsyncGenerator[ImageEvent]:
        """Generate one image, yielding its previews on the way.

        Raises:
            APIError: the error to send to the client; raised before the first event or after any event.
        """
        deadline = asyncio.get_running_loop().time() + self.settings.request_timeout_s
        with self._slot(), self._in_time(self.settings.request_timeout_s):
            async with asyncio.timeout_at(deadline):
                (planned,) = await self._plan(request, context, files)
            async with aclosing(self.replicas.watch(planned)) as pictures:
                with self._counted(planned):
                    for index in count():
                        async with asyncio.timeout_at(deadline):
                            picture = await anext(pictures)
                        if picture.waited_s is not None:
                            break
                        yield PartialImageEvent(
                            type="image_edit.partial_image"
                            if files.images
                            else "image_generation.partial_image",
                            b64_json=base64.b64encode(picture.file).decode(),
                            partial_image_index=index,
                            created_at=int(time.time()),
                            size=picture.size,
                            quality=shown_quality(request) or "auto",
                            output_format=request.output_format,
                        )
            (data,) = await self.delivery.deliver(request, [planned], [picture], context)
        yield CompletedEvent(
            type="image_edit.completed" if files.images else "image_generation.completed",
            id=data.id,
            b64_json=data.b64_json or "",
            seed=data.seed,
            model=label(planned.version),
            adapters=choices_of(planned),
            created_at=int(time.time()),
            size=picture.size,
            quality=shown_quality(request) or "auto",
            output_format=request.output_format,
        )

    async def rollout(self) -> RolloutStatus:
        """Return the answer to GET /v1/rollout: champion and candidate, their answers and feedback."""
        candidate, notices = self.catalogue.candidate, [self.watcher.notice]
        tallies: list[FeedbackTally] = []
        try:
            tallies = await asyncio.to_thread(self.feedback.tally)
        except APIError as error:  # the rest of the answer is still useful to an operator
            notices.append(error.message)
        drift = latest_drift(await self.replicas.loads())
        return RolloutStatus(
            champion=label(self.catalogue.champion),
            candidate=candidate and label(candidate),
            candidate_share=self.settings.candidate_share,
            versions={name: tally.summary() for name, tally in self.canary.tallies.items()},
            quality={f"{model}@{version}": each for (model, version), each in drift.items()},
            feedback=tallies,
            taken_out=self.canary.taken_out,
            shadow=ShadowCounts(stored=self.shadow.stored, passed_over=self.shadow.passed_over),
            notice="; ".join(filter(None, notices)) or None,
        )

    async def metrics_text(self) -> bytes:
        """Return the answer to GET /metrics: metrics of the endpoint and its replicas."""
        self._name_versions()
        loads = await self.replicas.loads()
        engines = {f"{each.replica} {name}": load for each in loads for name, load in each.engines.items()}
        self.metrics.engines(engines, len(loads))
        for (model, version), scores in latest_drift(loads).items():
            self.metrics.drift(model, version, scores)
        return await asyncio.to_thread(self.metrics.render)

    def _name_versions(self) -> None:
        """Pass the served versions to the metrics when they have changed."""
        catalogue = self.catalogue
        known = [catalogue.champion, catalogue.candidate, catalogue.entries]
        if any(one is not other for one, other in zip(known, self._named or (None,) * 3, strict=True)):
            self._named = known
            offered = [offer.version for offer in catalogue.offers()]
            versions = [catalogue.champion, catalogue.candidate, *offered]
            served = [(each.name, each.version) for each in versions if each is not None]
            self.metrics.serve([*served[:2], (BASE, BASE), *served[2:]])

    async def _plan(
        self, request: ImageRequest, context: RequestContext, files: GivenFiles
    ) -> list[RoutedRequest]:
        planned = await self.planner.plan(request, context, files)
        self._name_versions()
        return planned

    @contextmanager
    def _slot(self) -> Iterator[None]:
        """Occupy one of the slots for open requests.

        Raises:
            APIError: 503, all slots are occupied.
        """
        limit = self.settings.max_queued_requests
        if self.num_open >= limit:
            message = f"the server has {limit} open requests, which is its limit; try again later"
            raise APIError(503, message, None, "queue_full", {"retry-after": "1"})
        self.num_open += 1
        try:
            yield
        finally:
            self.num_open -= 1

    @contextmanager
    def _in_time(self, seconds: float) -> Iterator[None]:
        """Turn a TimeoutError into an APIError 504."""
        try:
            yield
        except TimeoutError:
            message = f"not finished within {seconds:g} s; request fewer steps or images, or try again later"
            raise APIError(504, message, code="timeout") from None

    @contextmanager
    def _counted(self, planned: RoutedRequest) -> Iterator[None]:
        """Count an answer or a server error of champion or candidate; a client's disconnect is neither."""
        version, started = label(planned.version), time.monotonic()
        compared = planned.version in (self.catalogue.champion, self.catalogue.candidate)
        try:
            yield
        except (APIError, TimeoutError) as error:
            if compared and (isinstance(error, TimeoutError) or error.status >= 500):
                self.canary.failed(version)
                self._judge()
            raise
        if compared:
            self.canary.answered(version, seconds=time.monotonic() - started, steps=planned.request.steps)
            self._judge()

    def _judge(self) -> None:
        """Remove the candidate if it exceeds its limits."""
        candidate, champion = self.catalogue.candidate, self.catalogue.champion
        if candidate is None:
            return
        reason = self.canary.objection(label(champion), label(candidate))
        if reason:
            self._take_out(candidate, reason)

    def _take_out(self, candidate: RegisteredModel, reason: str) -> None:
        """Let the candidate answer no more, and remove its alias."""
        self.canary.taken_out[label(candidate)] = reason
        self.catalogue.candidate = None
        logger.warning("%s is taken out: %s", label(candidate), reason)
        self.background.start(self._withdraw(candidate, reason))

    async def _withdraw(self, candidate: RegisteredModel, reason: str) -> None:
        """Remove the alias in the registry, so that a restarted endpoint does not serve the candidate."""
        try:
            await asyncio.to_thread(withdraw, self.config, candidate.version, reason)
        except Exception as error:  # this endpoint no longer serves it, whatever the registry answers
            logger.warning("%s keeps its alias in the registry: %s", label(candidate), error)

    async def _clean(self) -> None:
        """Delete what has expired, from time to time."""
        while True:
            try:
                await asyncio.to_thread(self.links.delete_expired)
                await asyncio.to_thread(self.jobs.delete_expired)
                if days := self.settings.keep_days:
                    await asyncio.to_thread(self.feedback.delete_before, time.time() - DAY_S * days)
                    await asyncio.to_thread(self.shadow.delete_before, time.time() - DAY_S * days)
            except (OSError, SQLAlchemyError) as error:
                logger.warning("what has expired was not deleted: %s", error)
            await asyncio.sleep(CLEANING_S)

    async def _watch_quality(self) -> None:
        """Judge candidate and champion by quality until cancelled."""
        while True:
            await asyncio.sleep(self.settings.follow_s)
            try:
                await self.judge_quality()
            except Exception as error:  # no failure may end the watch
                logger.warning("versions were not judged by their quality: %s", error)

    async def judge_quality(self) -> None:
        """Withdraw or promote the candidate, or take the champion back, if its quality says so."""
        candidate, champion = self.catalogue.candidate, self.catalogue.champion
        former = self.catalogue.alias(PREVIOUS)
        drift = latest_drift(await self.replicas.loads())
        if candidate:
            compared = await self._compared(candidate, champion)
            scores = drift.get((candidate.name, candidate.version))
            if reason := self.quality.objection(compared, scores):
                self._take_out(candidate, reason)
            elif self.quality.is_better(compared):
                await asyncio.to_thread(promote, self.config, candidate.version)
                logger.warning(
                    "%s is promoted: people preferred it in %d of %d comparisons",
                    label(candidate),
                    compared.wins,
                    sum(compared),
                )
        # `previous` is the version that the champion has replaced, until the champion is taken back.
        named = self.catalogue.alias(CHAMPION)
        if former and named and named.version == champion.version != former.version:
            compared = await self._compared(champion, former)
            scores = drift.get((champion.name, champion.version))
            if reason := self.quality.objection(compared, scores):
                await asyncio.to_thread(take_back, self.config, champion.version, reason)
                self.canary.taken_out[label(champion)] = reason
                logger.warning("%s is taken back: %s", label(champion), reason)

    async def _compared(self, one: RegisteredModel, other: RegisteredModel) -> Compared:
        return await asyncio.to_thread(self.feedback.compared, one.name, one.version, other.version)

    async def _draw_shadow(self, request: RoutedRequest) -> bytes:
        try:
            (picture,) = await self.replicas.draw([request])
        except APIError as error:
            self.metrics.drawn("shadow", error.status)
            raise
        self.metrics.drawn("shadow", 200)
        return picture.file


def latest_drift(loads: Sequence[ReplicaLoad]) -> dict[tuple[str, int], DriftScores]:
    """Return the most recent drift scores of any replica, by model name and version."""
    scores = [item for each in loads for item in each.drift.items()]
    return dict(sorted(scores, key=lambda item: item[1].scored_at))
