"""The ingress's view of the replicas: a call a picture, what went wrong, and once more if a replica died."""

import asyncio
import time
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import suppress
from math import inf
from typing import Any, TypeVar

from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle

from ray_jobs.config import ConfigError
from ray_jobs.registry.models import RegisteredModel, verify_weights
from serving.messages import Order, Picture, ReplicaLoad, Traits, adapter_name, label
from serving.schemas import APIError

ATTEMPTS = 3  # a picture that ended so many replicas is not tried again: it may be what ends them
WARM_UP_S = 600  # a replica may take to load a version
ANSWER_S = 5  # a replica may take to tell what it does
STATUS_S = 1.0  # for so long what Serve said of the replicas is repeated

T = TypeVar("T")


class ReplicaClient:
    """Serve finds the replicas, so nothing is known here of which ones live.

    Args:
        model: handle of the deployment `replica.Model`.
    """

    def __init__(self, model: DeploymentHandle) -> None:
        self._model = model
        self._traits: Traits | None = None
        self._verified: set[str] = set()
        self._loads: list[ReplicaLoad] = []
        self._asking = asyncio.Lock()
        self._running = (-inf, False, "")  # when it was asked, and what was answered

    async def traits(self) -> Traits:
        """What the model draws; asked for once."""
        if self._traits is None:
            self._traits = await _answered(self._model.traits.remote())
        assert self._traits is not None
        return self._traits

    async def draw(self, orders: Sequence[Order]) -> list[Picture]:
        """The pictures, each from any replica. If the caller leaves, or one fails, all are cancelled.

        A picture follows from its order, so one whose replica died is drawn again by another.

        Raises:
            APIError: what the client is told.
        """
        return await all_or_none([self._draw(order) for order in orders])

    async def _draw(self, order: Order) -> Picture:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return Picture(*await _answered(self._model.draw.remote(order)))
            except APIError as error:
                if error.code != "model_lost" or attempt == ATTEMPTS:
                    raise
        raise AssertionError("the last attempt returns or raises")

    async def watch(self, order: Order) -> AsyncGenerator[Picture]:
        """The unfinished pictures of an order, then the finished one.

        Raises:
            APIError: what the client is told; also if the replica dies, for the client has seen some then.
        """
        pictures = self._model.options(stream=True).watch.remote(order)
        try:
            async for picture in pictures:
                yield picture
        except (RayError, RayServeException) as error:
            raise _told(error) from error
        finally:
            pictures.cancel()

    async def warm_up(self, version: RegisteredModel | None, *, fused: bool = False) -> None:
        """Have every replica load a version, draw with it, and return when all have.

        A replica that dies meanwhile is passed over; the next one loads what it is asked for. Where there is
        none, for nobody asks, only the weights are checked, once.

        Raises:
            APIError: the version cannot be served.
        """
        results = await self._ask_all("warm_up", version, fused, timeout_s=WARM_UP_S)
        for result in results:
            if isinstance(result, RayTaskError):
                raise _told(result) from result
        if version is not None and not results and adapter_name(version) not in self._verified:
            try:
                await asyncio.to_thread(verify_weights, version, version.source)
                self._verified.add(adapter_name(version))
            except ConfigError as error:
                message = f"{label(version)} cannot be served: {error}"
                raise APIError(503, message, "model", "model_refused") from error

    async def loads(self) -> list[ReplicaLoad]:
        """What the replicas are doing; what they did last, while one does not answer soon."""
        with suppress(TimeoutError):
            results = await self._ask_all("load", timeout_s=ANSWER_S)
            self._loads = [each for each in results if isinstance(each, ReplicaLoad)]
        return self._loads

    async def check_running(self, *, may_sleep: bool) -> None:
        """Raise APIError 503 unless a replica is there.

        Args:
            may_sleep: none is enough, if one is started as soon as somebody asks.
        """
        async with self._asking:  # however many ask, Serve is asked once a second
            asked, running, reason = self._running
            if time.monotonic() - asked > STATUS_S:
                running, reason = await self._status(may_sleep)
                self._running = time.monotonic(), running, reason
        if not running:
            raise APIError(503, f"no replica runs: {reason}", code="model_not_loaded")

    async def _status(self, may_sleep: bool) -> tuple[bool, str]:
        """Whether replicas run or may be started, and what Serve says of them."""
        application = serve.get_replica_context().app_name
        # Asked of the controller, not of the model, which would answer late under load.
        status = await asyncio.to_thread(serve.status)
        model = status.applications[application].deployments["Model"]
        running = any(state == "RUNNING" and count for state, count in model.replica_states.items())
        asleep = may_sleep and model.status in ("HEALTHY", "UPSCALING", "DOWNSCALING")
        return running or asleep, f"{model.status.lower()} {model.message}".strip()

    async def _ask_all(self, method: str, *arguments: Any, timeout_s: float) -> list[Any]:
        """Every replica's answer or exception; none without replicas."""
        try:
            broadcast = self._model.broadcast(method, *arguments)
            return await broadcast.results_async(timeout_s=timeout_s, return_exceptions=True)
        except DeploymentUnavailableError:
            return []


async def all_or_none(work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """The results in order; the first exception, or being cancelled, cancels the rest."""
    tasks = [asyncio.ensure_future(each) for each in work]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()


async def _answered(response: Any) -> Any:
    """A replica's answer; one that is waited for no more is cancelled there too.

    Raises:
        APIError: what the client is told.
    """
    try:
        return await response
    except asyncio.CancelledError:
        response.cancel()
        raise
    except (RayError, RayServeException) as error:
        raise _told(error) from error


def _told(error: Exception) -> APIError:
    """What the client is told of a replica's error."""
    if isinstance(error, RayTaskError):
        if isinstance(error.cause, APIError):
            return error.cause
        return APIError(500, f"drawing failed: {error.cause}", code="drawing_failed")
    return APIError(503, "the model stopped while drawing; try again", code="model_lost")
