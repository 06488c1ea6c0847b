"""The endpoint without HTTP and Ray: time-outs, and a candidate that is taken out by itself."""

import asyncio
import json
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.storage import Storage
from ray_jobs.config import Config
from ray_jobs.registry.models import CANDIDATE, RegisteredModel, open_client, registered
from ray_jobs.registry.promotion import Measured
from ray_jobs.registry.registration import register
from serving.feedback.database import open_database
from serving.feedback.store import FeedbackStore
from serving.messages import BASE, RoutedRequest, label, placement_of
from serving.request import Request
from serving.schemas import APIError, EditRequest, ImageRequest
from serving.service.given_files import GivenFiles
from serving.service.request_context import RequestContext
from serving.service.rollout import TAKEN_OUT, RolloutStatus
from serving.service.service import Service
from serving.service.shadow import Shadow, Shadowed
from tests.serving.conftest import save_adapters
from tests.serving.page_server import service_here

REQUESTS = 20  # of each version before the candidate is judged


@pytest.fixture(scope="module")
def watched(config: Config, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Two versions of a model of its own, champion and candidate."""
    serve: dict[str, Any] = {"keys": None, "allow_anonymous": True, "safety_checker": None}
    serve |= {"drift_pictures": 0, "replicas": 64, "rollback_requests": REQUESTS, "candidate_share": 0.5}
    watched = config.model_copy(
        update={
            "publish": config.publish.model_copy(update={"model_name": "watched"}),
            "serve": config.serve.model_copy(update=serve),
        }
    )
    for seed, fid in ((1, 10.0), (2, 20.0)):
        folder = save_adapters(tiny_model, tmp_path_factory.mktemp("watched") / str(seed), seed)
        measured = Measured(fid, None, num_samples=96, feature_network="inception@1", data="9f" * 32)
        register(watched, source=str(folder), measured=measured, params={})
    return watched


@pytest.fixture(scope="module")
def versions(watched: Config) -> list[RegisteredModel]:
    return [registered(watched, number) for number in "12"]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[FeedbackStore]:
    store = FeedbackStore(open_database(f"sqlite:///{tmp_path / 'feedback.db'}"))
    yield store
    store.close()


def changed(config: Config, **fields: Any) -> Config:
    return config.model_copy(update={"serve": config.serve.model_copy(update=fields)})


async def answered(service: Service, version: RegisteredModel, **fields: Any) -> int:
    """The status of a request for a version."""
    request = ImageRequest(prompt="a red apple", model=f"{version.name}@{version.version}", **fields)
    try:
        if request.stream:
            async for _ in service.stream(request, RequestContext()):
                pass
        else:
            await service.generate(request, RequestContext())
    except APIError as error:
        return error.status
    return 200


def served(
    config: Config,
    versions: list[RegisteredModel],
    store: FeedbackStore,
    work: Callable[[Service, Any], Coroutine[Any, Any, Any]],
) -> Any:
    """What `work` gives of a service with a champion and a candidate, and of its replica."""
    champion, candidate = versions
    with service_here(config, champion, candidate, store) as (service, model):
        service.catalogue.candidate = candidate
        return asyncio.run(work(service, model))


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_takes_too_long_is_a_504_frees_its_row_and_counts_against_its_version(
    watched: Config, versions: list[RegisteredModel], store: FeedbackStore, stream: bool
) -> None:
    async def work(service: Service, model: Any) -> None:
        assert await answered(service, versions[0], steps=100, stream=stream) == 504
        assert service.canary.tallies["watched@1"].errors == 1
        engine = model.engine_cache.engines[BASE].engine
        while engine.unfinished:
            await asyncio.sleep(0.01)
        assert engine.load().row_steps < 100
        assert service.num_open == 0

    served(changed(watched, request_timeout_s=0.1), versions, store, work)


def test_a_candidate_that_fails_is_taken_out_and_loses_its_alias(
    watched: Config, versions: list[RegisteredModel], store: FeedbackStore
) -> None:
    client = open_client(watched)
    client.set_registered_model_alias("watched", CANDIDATE, "2")
    champion, candidate = versions
    damaged = replace(candidate, digest="00" * 32)

    async def work(service: Service, _: Any) -> RolloutStatus:
        for _ in range(REQUESTS):
            assert await answered(service, champion, steps=1) == 200
            assert await answered(service, damaged, steps=1) == 503
        assert service.catalogue.candidate is None
        assert service.catalogue.find(None, "whoever") == champion, "nobody is given the candidate any more"
        await asyncio.gather(*service.background.tasks)
        return await service.rollout()

    status = served(watched, [champion, damaged], store, work)
    assert status.candidate is None
    assert "errors: 100.0% of the last 20 requests" in status.taken_out["watched@2"]
    assert CANDIDATE not in client.get_registered_model("watched").aliases
    assert "errors: 100.0%" in client.get_model_version("watched", "2").tags[TAKEN_OUT]


def test_only_champion_and_candidate_are_compared(
    watched: Config, versions: list[RegisteredModel], store: FeedbackStore
) -> None:
    """Versions are asked for by the thousand."""

    async def work(service: Service, _: Any) -> None:
        for model in ("watched@1", "watched@2", "base"):
            await service.generate(ImageRequest(prompt="a red apple", model=model, steps=1), RequestContext())
        assert set(service.canary.tallies) == {"watched@1", "watched@2"}

    served(watched, versions, store, work)


@pytest.mark.parametrize(("configured", "expected"), [(None, [1.5, 7.0, 1.5]), (4.0, [4.0, 4.0, 4.0])])
def test_the_usual_guidance_is_that_which_a_version_was_scored_with(
    watched: Config,
    versions: list[RegisteredModel],
    store: FeedbackStore,
    configured: float | None,
    expected: list[float],
) -> None:
    """The base alone is drawn as the champion is; what a request names comes before all."""
    scored = [
        replace(version, guidance_scale=scale) for version, scale in zip(versions, (1.5, 7.0), strict=True)
    ]

    async def work(service: Service, _: Any) -> None:
        async def guidance(model: str, **fields: Any) -> float:
            request = ImageRequest(prompt="a red apple", model=model, steps=1, **fields)
            [planned] = await service.planner.plan(request, RequestContext())
            return planned.request.guidance_scale

        asked = [scored[0].name, f"{scored[1].name}@2", BASE]
        assert [await guidance(model) for model in asked] == expected
        assert await guidance(asked[0], guidance_scale=2.0) == 2.0

    served(changed(watched, default_guidance_scale=configured, candidate_share=0.0), scored, store, work)


def test_a_model_that_is_admitted_and_not_there_is_told(
    watched: Config, versions: list[RegisteredModel], store: FeedbackStore
) -> None:
    async def work(service: Service, _: Any) -> str | None:
        await service.watcher.poll()
        return service.watcher.notice

    found = served(changed(watched, models=["nobody", "watched", "*"]), versions, store, work)
    assert found == "serve.models: the registry has no 'nobody'"


def test_shadows_go_on_where_the_last_process_stopped(
    versions: list[RegisteredModel], tmp_path: Path
) -> None:
    async def drawn(_: RoutedRequest) -> bytes:
        return b"a picture"

    async def store_one(number: int, *images: bytes) -> None:
        shadow = Shadow(Storage.open(str(tmp_path)), drawn, lambda: True, kept=2)
        running = asyncio.create_task(shadow.run())
        mask = b"a mask" if images else None
        answered = RoutedRequest(versions[0], Request("a", number, 4, 3.0), references=images, mask=mask)
        shadow.offer(Shadowed(f"img-{number}", answered, b"", answered._replace(version=versions[1])))
        while not shadow.stored:
            assert not shadow.passed_over
            await asyncio.sleep(0.01)
        running.cancel()

    for number, images in enumerate(((b"given", b"too"), (), ())):
        asyncio.run(store_one(number, *images))
        if images:
            files = [tmp_path / "000" / f"reference-{place}" for place in range(2)]
            assert tuple(file.read_bytes() for file in files) == images
            assert (tmp_path / "000" / "mask").read_bytes() == b"a mask"
    stored = [json.loads((tmp_path / place / "parameters.json").read_text()) for place in ("000", "001")]
    assert [each["seed"] for each in stored] == [2, 1], "the oldest was written over"
    assert stored[0] == {
        "id": "img-2",
        "champion": label(versions[0]),
        "candidate": label(versions[1]),
        "prompt": "a",
        "seed": 2,
        "steps": 4,
        "guidance_scale": 3.0,
        "negative_prompt": None,
        "height": None,
        "width": None,
        "previews": 0,
        "strength": 1.0,
        "control_scale": 1.0,
        "guidance_interval": [0.0, 1.0],
        "image_id": "",
        "scored": False,
        "asked": 0.0,
        "fused": False,
    }
    assert not any(file.exists() for file in files), "with all that belonged to it"


def test_a_shadow_of_an_edit_is_stored_with_its_picture_and_others_follow(
    watched: Config, versions: list[RegisteredModel], store: FeedbackStore, tmp_path: Path
) -> None:
    from io import BytesIO

    from PIL import Image

    file = BytesIO()
    Image.new("RGB", (64, 64), "red").save(file, "PNG")
    config = changed(watched, shadow_share=1.0, fuse_champion=True).model_copy(
        update={"storage": str(tmp_path)}
    )

    async def work(service: Service, model: Any) -> set[str]:
        service.start(poll_now=False)
        for kind, images in ((EditRequest, (file.getvalue(),)), (ImageRequest, ())):
            request = kind(prompt="a red apple", model="watched:champion", steps=2)
            await service.generate(request, RequestContext(), GivenFiles(images))
        while service.shadow.stored < 2:
            assert not service.shadow.passed_over
            await asyncio.sleep(0.01)
        for task in service.background.tasks:
            task.cancel()
        return set(model.engine_cache.engines)

    engines = served(config, versions, store, work)
    folder = tmp_path / config.name / "shadow"
    assert (folder / "000" / "given").read_bytes() == file.getvalue()
    assert (folder / "001" / "parameters.json").exists() and not (folder / "001" / "given").exists()
    assert engines == {BASE, placement_of(versions[0], fused=True).engine}, "a shadow is no champion"
