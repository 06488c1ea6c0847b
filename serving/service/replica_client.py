"""The ingress's client of the replicas: one call per image, error translation, retries if a replica dies."""

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
from serving.messages import (
    BaseTraits,
    Picture,
    ReplicaLoad,
    RoutedRequest,
    adapter_name,
    base_of,
    refusal,
)
from serving.schemas import DRAWING_FAILED, APIError

ATTEMPTS = 3  # maximum per image: an image that keeps losing its replica may be what kills them
WARM_UP_S = 600  # timeout for a replica to load a version, in seconds
ANSWER_S = 5  # timeout for a replica to report its load, in seconds
STATUS_S = 1.0  # how long Serve's replica status is cached, in seconds

T = TypeVar("T")


class ReplicaClient:
    """Client of all replicas. Ray Serve picks the replica for each call.

    Args:
        model: handle of the deployment `replica.Model`.
    """

    def __init__(self, model: DeploymentHandle) -> None:
        self._model = model
        self._traits: BaseTraits | None = None
        self._verified: set[str] = set()
        self._loads: list[ReplicaLoad] = []
        self._asking = asyncio.Lock()
        self._running = (-inf, False, "")  # time of the last status query, and its result

    async def traits(self) -> BaseTraits:
        """Return what the ingress needs to know about the model; queried once."""
        if self._traits is None:
            self._traits = await _result_of(self._model.traits.remote())
        assert self._traits is not None
        return self._traits

    async def draw(self, requests: Sequence[RoutedRequest]) -> list[Picture]:
        """Generate the images, each on any replica. If the caller is cancelled or one fails, cancel all.

        A request determines its image, so if a replica dies another one repeats the request.

        Raises:
            APIError: the error to send to the client.
        """
        return await all_or_none([self._draw(each) for each in requests])

    async def _draw(self, request: RoutedRequest) -> Picture:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return Picture(*await _result_of(self._model.draw.remote(request)))
            except APIError as error:
                if error.code != "model_lost" or attempt == ATTEMPTS:
                    raise
        raise AssertionError("the last attempt returns or raises")

    async def watch(self, request: RoutedRequest) -> AsyncGenerator[Picture]:
        """Yield the previews of a request, then the finished image.

        Raises:
            APIError: the error to send to the client; also if the replica dies, because the client may have
                received previews already.
        """
        pictures = self._model.options(stream=True).watch.remote(request)
        try:
            async for picture in pictures:
                yield picture
        except (RayError, RayServeException) as error:
            raise _api_error(error) from error
        finally:
            pictures.cancel()

    async def warm_up(self, version: RegisteredModel | None, *, fused: bool = False) -> None:
        """Have every replica load a version and generate an image with it; return when all have.

        A replica that dies meanwhile is skipped; its successor loads versions on request. If no replica is
        running, for lack of requests, only the weights are verified, once.

        Raises:
            APIError: the version cannot be served.
        """
        results = await self._ask_all("warm_up", version, fused, timeout_s=WARM_UP_S)
        for result in results:
            if isinstance(result, RayTaskError):
                raise _api_error(result) from result
        if version is not None and not results and adapter_name(version) not in self._verified:
            try:
                await asyncio.to_thread(verify_weights, version, version.source)
                self._verified.add(adapter_name(version))
            except ConfigError as error:
                message = refusal(version, base_of(version), error)
                raise APIError(503, message, "model", "model_refused") from error

    async def loads(self) -> list[ReplicaLoad]:
        """Return the replicas' loads; the previous ones if a replica does not answer in time."""
        with suppress(TimeoutError):
            results = await self._ask_all("load", timeout_s=ANSWER_S)
            self._loads = [each for each in results if isinstance(each, ReplicaLoad)]
        return self._loads

    async def check_running(self, *, may_sleep: bool) -> None:
        """Raise APIError 503 unless a replica is running.

        Args:
            may_sleep: accept zero replicas, if one is started at the next request.
        """
        async with self._asking:  # Serve is queried once per second, however many callers there are
            asked, running, reason = self._running
            if time.monotonic() - asked > STATUS_S:
                running, reason = await self._status(may_sleep)
                self._running = time.monotonic(), running, reason
        if not running:
            raise APIError(503, f"no replica is running: {reason}", code="model_not_loaded")

    async def _status(self, may_sleep: bool) -> tuple[bool, str]:
        """Return True if replicas run or may be started, and Serve's status for clients.

        Its message, which the controller logs, holds a replica's traceback.
        """
        application = serve.get_replica_context().app_name
        # Queries the controller, not the model, which would answer late under load.
        status = await asyncio.to_thread(serve.status)
        model = status.applications[application].deployments["Model"]
        running = any(state == "RUNNING" and count for state, count in model.replica_states.items())
        asleep = may_sleep and model.status in ("HEALTHY", "UPSCALING", "DOWNSCALING")
        return running or asleep, f"{model.status.lower()}, see the log of Ray Serve's controller"

    async def _ask_all(self, method: str, *arguments: object, timeout_s: float) -> list[Any]:
        """Call a method on every replica, and return their answers or exceptions; empty without replicas."""
        try:
            broadcast = self._model.broadcast(method, *arguments)
            return await broadcast.results_async(timeout_s=timeout_s, return_exceptions=True)
        except DeploymentUnavailableError:
            return []


async def all_or_none(work: Sequence[Coroutine[object, None, T]]) -> list[T]:
    """Return the results in order; the first exception, or cancellation, cancels the rest."""
    tasks = [asyncio.ensure_future(each) for each in work]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()


async def _result_of(response: Any) -> Any:
    """Return a replica's answer; if the caller is cancelled, cancel the call on the replica too.

    Raises:
        APIError: the error to send to the client.
    """
    try:
        return await response
    except asyncio.CancelledError:
        response.cancel()
        raise
    except (RayError, RayServeException) as error:
        raise _api_error(error) from error


def _api_error(error: Exception) -> APIError:
    """Return the error to send to the client for a replica's error; for the log, if it is DRAWING_FAILED."""
    if isinstance(error, RayTaskError):
        if isinstance(error.cause, APIError):
            return error.cause
        return APIError(500, f"image generation failed: {error.cause}", code=DRAWING_FAILED)
    return APIError(503, "the replica stopped while generating the image; try again", code="model_lost")
