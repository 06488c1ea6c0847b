"""The endpoint in this process: application, service, replica and engine are real, only Ray is not there.

`HandleHere` calls the replica's methods where a `DeploymentHandle` would send them.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from typing import Any

from ray_jobs.config import Config
from ray_jobs.registry.models import CANDIDATE, CHAMPION, RegisteredModel, RegistryEntry
from serving.feedback.store import FeedbackStore
from serving.http.access import Access
from serving.http.api import create_api
from serving.http.api_keys import KeyRing
from serving.messages import base_of
from serving.replica.replica import Model
from serving.service.replica_client import ReplicaClient
from serving.service.service import Service
from tests.serving.http_server import http_server


class HandleHere:
    """What `ReplicaClient` asks of a handle of `replica.Model`."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def options(self, *, stream: bool) -> "HandleHere":
        return self

    def broadcast(self, method: str, *arguments: Any) -> "AnswersHere":
        return AnswersHere(getattr(self._model, method)(*arguments))

    def __getattr__(self, name: str) -> "MethodHere":
        return MethodHere(getattr(self._model, name))


class MethodHere:
    def __init__(self, method: Callable[..., Any]) -> None:
        self._method = method

    def remote(self, *arguments: Any) -> Any:
        result = self._method(*arguments)
        return asyncio.ensure_future(result) if asyncio.iscoroutine(result) else PicturesHere(result)


class AnswersHere:
    """Of all replicas: of the only one."""

    def __init__(self, answer: Coroutine[Any, Any, Any]) -> None:
        self._answer = answer

    async def results_async(self, *, timeout_s: float, return_exceptions: bool) -> list[Any]:
        async with asyncio.timeout(timeout_s):
            return list(await asyncio.gather(self._answer, return_exceptions=return_exceptions))


class PicturesHere:
    """A stream of a replica's; cancelling it ends the drawing."""

    def __init__(self, pictures: AsyncGenerator[bytes]) -> None:
        self._pictures = pictures
        self._closing: asyncio.Future[None] | None = None

    def __aiter__(self) -> AsyncGenerator[bytes]:
        return self._pictures

    def cancel(self) -> None:
        self._closing = asyncio.ensure_future(self._pictures.aclose())


async def _model(config: Config, first: RegisteredModel) -> Any:
    model = object.__new__(Model.func_or_class)  # type: ignore[attr-defined]
    await model.__init__(config.serve, config.evaluate, base_of(first), first)
    return model


@contextmanager
def service_here(
    config: Config, champion: RegisteredModel, candidate: RegisteredModel, store: FeedbackStore
) -> Iterator[tuple[Service, Any]]:
    """A service and its only replica while the block runs; the registry holds two versions of one model."""
    with ThreadPoolExecutor(1) as thread:  # the browser's driver has a loop in this one
        model = thread.submit(asyncio.run, _model(config, champion)).result()
    service = Service(config, champion, ReplicaClient(HandleHere(model)), store)
    versions = {each.version: each for each in (champion, candidate)}
    aliases = {CHAMPION: champion.version, CANDIDATE: candidate.version}
    service.catalogue.entries = {champion.name: RegistryEntry(versions, aliases)}
    service.watcher.polled = True
    try:
        yield service, model
    finally:
        for engine in model.engine_cache.engines.values():
            engine.stop()


@asynccontextmanager
async def jobs_drawn(service: Service) -> AsyncIterator[None]:
    """Draw the service's jobs while the block runs."""
    work = asyncio.create_task(service.jobs.run())
    yield
    work.cancel()
    await asyncio.wait([work])


@contextmanager
def page_server(
    config: Config, champion: RegisteredModel, candidate: RegisteredModel, store: FeedbackStore
) -> Iterator[str]:
    """The URL of the page while the block runs, as `service_here`."""
    with service_here(config, champion, candidate, store) as (service, _):
        api, keys = create_api(service), KeyRing.of(config.serve)
        api.router.lifespan_context = lambda _: jobs_drawn(service)
        api.add_middleware(Access, settings=config.serve, keys=keys, metrics=service.metrics)
        with http_server(api) as url:
            yield url
