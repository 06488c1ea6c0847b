"""A replica, without Ray around it: versions of both methods side by side, and what is refused."""

import asyncio
import io
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ray_jobs.config import EvaluateConfig, ServeConfig
from ray_jobs.registry.digests import weights_digest
from ray_jobs.registry.models import RegisteredModel
from serving.messages import (
    BASE,
    Base,
    BaseTraits,
    Picture,
    RoutedRequest,
    base_of,
    placement_of,
    public_name,
)
from serving.provenance import encode_png, read_provenance
from serving.replica.replica import TOO_MANY_FAILURES, Model
from serving.request import Request, alone
from serving.schemas import APIError
from tests.serving.conftest import save_adapters


@pytest.fixture(scope="module")
def lora(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> RegisteredModel:
    folder = save_adapters(tiny_model, tmp_path_factory.mktemp("replica") / "lora", seed=5)
    return RegisteredModel(
        "m", 1, str(folder), weights_digest(str(folder)), str(tiny_model), None, "lora", {}
    )


@pytest.fixture(scope="module")
def full(
    tiny_model: Path, lora: RegisteredModel, tmp_path_factory: pytest.TempPathFactory
) -> RegisteredModel:
    """A whole pipeline with other weights than the base."""
    from ray_jobs.weights.loading import load_pipeline

    pipeline = load_pipeline(str(tiny_model))
    with torch.no_grad():
        pipeline.unet.conv_out.bias += 0.5
    folder = str(tmp_path_factory.mktemp("replica") / "full")
    pipeline.save_pretrained(folder)
    return replace(lora, version=2, source=folder, digest=weights_digest(folder), method="full")


@asynccontextmanager
async def replica(
    first: RegisteredModel, newest: Callable[[], RegisteredModel] | None = None, **settings: Any
) -> AsyncIterator[Any]:
    model = object.__new__(Model.func_or_class)  # type: ignore[attr-defined]
    # So many replicas leave each one thread of the machine's.
    serve = ServeConfig(**{"max_batch_size": 4, "replicas": 64} | settings)
    await model.__init__(serve, EvaluateConfig(), base_of(first), first, newest)
    try:
        yield model
    finally:
        for thread in model.engine_cache.engines.values():
            await asyncio.to_thread(thread.stop)


def with_replica(first: RegisteredModel, work: Callable[[Any], Awaitable[Any]], **settings: Any) -> Any:
    async def run() -> Any:
        async with replica(first, **settings) as model:
            return await work(model)

    return asyncio.run(run())


def routed(
    version: RegisteredModel | None, *, image: bytes | None = None, fused: bool = False, **fields: Any
) -> RoutedRequest:
    request = replace(Request("a red apple", 3, 4, 3.0), **fields)
    return RoutedRequest(version, request, image, fused=fused)


def pixels(picture: Picture) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(picture.file))).astype(int)


def test_base_adapter_and_fully_trained_version_are_drawn_side_by_side(
    lora: RegisteredModel, full: RegisteredModel
) -> None:
    async def work(model: Any) -> tuple[list[Picture], set[str]]:
        drawn = await asyncio.gather(*(model.draw(routed(each)) for each in (None, lora, full)))
        return drawn, set((await model.load()).engines)

    drawn, engines = with_replica(lora, work)
    assert len({picture.file for picture in drawn}) == 3
    assert engines == {BASE, placement_of(full).engine}


def test_engines_that_are_asked_for_at_once_all_have_their_weights(
    lora: RegisteredModel, full: RegisteredModel
) -> None:
    """As after a replica's death, when all that waited asks the next one."""

    async def work(model: Any) -> list[Picture]:
        orders = [routed(None), routed(lora, fused=True)]
        return await asyncio.gather(*(model.draw(each) for each in orders))

    assert len({picture.file for picture in with_replica(full, work)}) == 2


def test_a_fully_trained_champion_needs_no_base(full: RegisteredModel) -> None:
    async def work(model: Any) -> tuple[set[str], BaseTraits]:
        await model.draw(routed(full))
        return set((await model.load()).engines), await model.traits()

    assert with_replica(full, work) == (
        {placement_of(full).engine},
        BaseTraits(height=64, width=64, max_references=0),
    )


@pytest.mark.parametrize("solver", ["model", "euler"])
def test_a_fully_trained_version_draws_what_diffusers_draws_with_it(
    full: RegisteredModel, solver: str
) -> None:
    from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(full.source, safety_checker=None)
    if solver == "euler":
        pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    plain = pipeline(
        "a red apple",
        generator=torch.Generator().manual_seed(3),
        num_inference_steps=4,
        guidance_scale=3.0,
    ).images[0]
    drawn = with_replica(full, lambda model: model.draw(routed(full)), solver=solver)
    assert np.abs(pixels(drawn) - np.asarray(plain)).max() <= 2


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_weights_that_are_not_those_registered_are_refused(
    lora: RegisteredModel, full: RegisteredModel, kind: str
) -> None:
    changed = replace(lora if kind == "lora" else full, version=9, digest="00" * 32)

    async def work(model: Any) -> Picture:
        for _ in range(2):
            with pytest.raises(
                APIError, match="m@9 cannot be served: .*not the weights registered"
            ) as refused:
                await model.warm_up(changed)
            assert (refused.value.status, refused.value.code) == (503, "model_refused")
            assert str(Path(changed.source).parent) not in refused.value.message, "clients see it"
        return await model.draw(routed(lora))

    assert with_replica(lora, work)


def test_weights_that_are_gone_are_refused(lora: RegisteredModel) -> None:
    gone = replace(lora, version=9, source="/nowhere", digest="11" * 32)

    async def work(model: Any) -> None:
        with pytest.raises(APIError, match="m@9 cannot be served: .*cannot be read"):
            await model.draw(routed(gone))

    with_replica(lora, work)


def test_a_replica_starts_though_its_first_version_is_refused(lora: RegisteredModel) -> None:
    broken = replace(lora, digest="22" * 32)
    assert with_replica(broken, lambda model: model.draw(routed(lora)))


def test_a_replica_that_starts_later_loads_who_is_champion_then(
    lora: RegisteredModel, full: RegisteredModel
) -> None:
    async def work(model: Any) -> set[str]:
        return set((await model.load()).engines)

    assert with_replica(lora, work, newest=lambda: full) == {placement_of(full).engine}
    foreign = replace(full, base="another-base")
    assert with_replica(lora, work, newest=lambda: foreign) == {BASE}


def test_an_adapter_that_was_dropped_from_memory_is_not_warm_any_more(lora: RegisteredModel) -> None:
    async def work(model: Any) -> None:
        adapters = model.engine_cache.engines[BASE].engine.adapters
        await model.warm_up(lora)
        assert adapters.misses == 1
        adapters._kept.clear()
        await model.warm_up(lora)
        assert adapters.misses == 2 and adapters.holds(alone(placement_of(lora).adapter or ""))

    with_replica(lora, work)


def test_a_replica_whose_denoiser_fails_time_after_time_is_not_healthy(lora: RegisteredModel) -> None:
    async def work(model: Any) -> None:
        def burn(*_: Any) -> None:
            raise RuntimeError("device-side assert triggered")

        denoiser = model.engine_cache.engines[BASE].engine.denoiser
        for failures in (TOO_MANY_FAILURES - 1, TOO_MANY_FAILURES):
            hook = denoiser.register_forward_pre_hook(burn)
            for _ in range(failures):
                model.check_health()
                with pytest.raises(RuntimeError, match="device-side"):
                    await model.draw(routed(None))
            hook.remove()
            if failures < TOO_MANY_FAILURES:
                await model.draw(routed(None))
        with pytest.raises(RuntimeError, match="base: 5 calls in a row failed, and no image was drawn"):
            model.check_health()

    with_replica(lora, work)


def test_a_replica_whose_device_breaks_in_any_component_is_not_healthy(lora: RegisteredModel) -> None:
    async def work(model: Any) -> None:
        def burn(*_: Any) -> None:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

        engine = model.engine_cache.engines[BASE].engine
        model.check_health()
        engine.pipeline.text_encoder.register_forward_pre_hook(burn)  # no denoiser is reached
        with pytest.raises(RuntimeError, match="illegal memory access"):
            await model.draw(routed(None))
        with pytest.raises(RuntimeError, match="base: the GPU can no longer be used in this process"):
            model.check_health()

    with_replica(lora, work)


def too_small_for(engines: int, model: Any) -> Callable[..., None]:
    """A hook that behaves as a GPU whose memory does not hold so many engines."""

    def hook(*_: Any) -> None:
        if len(model.engine_cache.engines) >= engines:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    return hook


def test_a_request_for_which_memory_is_too_small_is_drawn_without_the_idle_engines(
    lora: RegisteredModel, full: RegisteredModel
) -> None:
    async def work(model: Any) -> tuple[list[Picture], list[Picture], list[Picture]]:
        plain = await model.draw(routed(lora))
        engine = model.engine_cache.engines[BASE].engine
        engine.denoiser.register_forward_pre_hook(too_small_for(2, model))
        await model.warm_up(full)
        both = await asyncio.gather(*(model.draw(routed(lora)) for _ in range(2)))  # fail in one batch
        assert set(model.engine_cache.engines) == {BASE}
        await model.warm_up(full)
        watched = [each async for each in model.watch(routed(lora, previews=2))]
        assert set(model.engine_cache.engines) == {BASE}
        model.check_health()
        return [plain], both, watched

    (plain,), both, watched = with_replica(lora, work)
    assert all(np.abs(pixels(each) - pixels(plain)).max() <= 1 for each in (*both, watched[-1]))
    assert len(watched) == 3


def test_a_version_for_which_memory_is_too_small_is_refused_and_the_others_are_served(
    lora: RegisteredModel, full: RegisteredModel
) -> None:
    loads = []

    async def work(model: Any) -> None:
        loaded, full_gpu = model._loaded, too_small_for(1, model)

        def load(name: str, make_room: Callable[[], None]) -> Any:
            loads.append(name)
            full_gpu()
            return loaded(name, make_room)

        model._loaded = load
        async with model._engine(None, False):  # in use
            with pytest.raises(APIError, match="m@2 cannot be served: .*device's memory") as refused:
                await model.warm_up(full)
            assert (refused.value.status, refused.value.code) == (503, "model_refused")
            await model.draw(routed(lora))
        await model.warm_up(full)
        assert set(model.engine_cache.engines) == {placement_of(full).engine}

    with_replica(lora, work)
    assert loads == [placement_of(full).engine] * 3, "refused; without room; in the place of the idle base"


def test_a_version_that_was_loaded_and_could_not_draw_is_not_warm(
    lora: RegisteredModel, full: RegisteredModel
) -> None:
    async def work(model: Any) -> None:
        async with model._engine(full, False) as (thread, _):
            hook = thread.engine.denoiser.register_forward_pre_hook(too_small_for(0, model))
        for _ in range(2):
            with pytest.raises(torch.OutOfMemoryError):
                await model.warm_up(full)
        hook.remove()
        await model.warm_up(full)

    with_replica(lora, work)


def test_watching_ends_with_what_drawing_gives(lora: RegisteredModel) -> None:
    async def work(model: Any) -> tuple[list[Picture], Picture]:
        return [each async for each in model.watch(routed(lora, previews=2))], await model.draw(routed(lora))

    seen, drawn = with_replica(lora, work)
    assert len(seen) == 3
    assert np.abs(pixels(seen[-1]) - pixels(drawn)).max() <= 1


def test_a_watcher_that_leaves_frees_its_row(lora: RegisteredModel) -> None:
    async def work(model: Any) -> int:
        watching = model.watch(routed(lora, previews=3, steps=400))
        await anext(watching)
        await watching.aclose()
        await model.draw(routed(lora))
        return int((await model.load()).engines[BASE].calls)

    assert with_replica(lora, work) < 400


@pytest.mark.parametrize(
    ("fields", "param", "reason"),
    [
        ({"width": 60}, "size", "60; must be a multiple of 8 pixels"),
        ({"seed": -1}, "seed", "-1; must be from 0"),
        ({"prompt": "\ud800"}, "prompt", "contains an unpaired surrogate"),
        ({"image": encode_png(np.zeros((9, 9, 3), np.uint8), None), "strength": 0.2}, "strength", "0.2 of 4"),
        ({"steps": 1001}, "steps", "DPMSolverMultistepScheduler cannot sample in 1001 steps"),
    ],
)
def test_what_the_engine_refuses_names_the_requests_field(
    lora: RegisteredModel, fields: dict[str, Any], param: str, reason: str
) -> None:
    async def work(model: Any) -> None:
        with pytest.raises(APIError) as refused:
            await model.draw(routed(lora, **fields))
        error = refused.value
        assert (error.status, error.param, error.code) == (400, param, "invalid_value")
        assert error.message.startswith(f"{param}: {reason}")

    with_replica(lora, work)


def test_unfinished_pictures_are_judged_and_the_finished_one_is_an_error(lora: RegisteredModel) -> None:
    narrow = routed(lora, previews=2, height=64, width=72)

    async def work(model: Any) -> None:
        with pytest.raises(APIError) as refused:
            [each async for each in model.watch(narrow)]
        assert (refused.value.status, refused.value.code) == (400, "content_policy_violation")

    with_replica(lora, work, safety_checker="tests.serving.plain_pictures:make_shape_checker")


@pytest.mark.parametrize(
    "switch",
    [{"precision": "bf16"}, {"int8_weights": True}, {"cache_features": True}, {"channels_last": True}],
)
def test_a_faster_switch_draws_nearly_the_same_picture_with_adapters_too(
    lora: RegisteredModel, switch: dict[str, Any]
) -> None:
    plain = pixels(with_replica(lora, lambda model: model.draw(routed(lora))))
    faster = pixels(with_replica(lora, lambda model: model.draw(routed(lora)), **switch))
    base = pixels(with_replica(lora, lambda model: model.draw(routed(None))))
    assert np.abs(faster - plain).mean() < np.abs(base - plain).mean() / 4
    if "channels_last" not in switch:
        assert (faster != plain).any()


def test_a_fused_champion_is_drawn_as_its_adapter_is_by_an_engine_of_its_own(lora: RegisteredModel) -> None:
    async def work(model: Any) -> tuple[list[Picture], set[str]]:
        before = set((await model.load()).engines)
        return [await model.draw(routed(lora, fused=fused)) for fused in (True, False)], before

    (fused, adapted), before = with_replica(lora, work, fuse_champion=True)
    assert before == {placement_of(lora, fused=True).engine}, "the champion is loaded before it is asked for"
    assert np.abs(pixels(fused) - pixels(adapted)).max() <= 1


@pytest.mark.parametrize("provenance", [True, False])
def test_a_picture_says_which_adapter_drew_it_unless_it_is_to_say_nothing(
    lora: RegisteredModel, provenance: bool
) -> None:
    drawn = with_replica(lora, lambda model: model.draw(routed(lora)), provenance=provenance)
    facts = read_provenance(drawn.file)
    assert (facts or {}).get("adapter") == (f"m@1#{lora.digest[:12]}" if provenance else None)
    assert (facts is None) != provenance


def test_a_picture_names_its_base_and_not_the_servers_folders(lora: RegisteredModel) -> None:
    png = with_replica(lora, lambda model: model.draw(routed(lora))).file
    assert (read_provenance(png) or {})["base"] == Path(lora.base).name
    assert str(Path(lora.base).parent).encode() not in png


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("/srv/models/emoji-base", "emoji-base"),
        ("s3://key:secret@bucket/models/emoji-base/?region=eu", "emoji-base"),
        ("black-forest-labs/FLUX.1-dev", "black-forest-labs/FLUX.1-dev"),
    ],
)
def test_clients_see_a_models_name_and_of_the_hub_its_owner(model: str, name: str) -> None:
    assert public_name(model) == name
    assert str(Base(model)) == f"{name} (plain)"


def test_the_denoiser_computes_attention_by_the_kernel_that_was_asked_for(lora: RegisteredModel) -> None:
    plain = pixels(with_replica(lora, lambda model: model.draw(routed(lora))))
    for kernel in ("flash", "math"):
        drawn = with_replica(lora, lambda model: model.draw(routed(lora)), attention=kernel)
        assert np.abs(pixels(drawn) - plain).max() <= 1


def test_a_compiled_replica_refuses_lora_versions(lora: RegisteredModel) -> None:
    async def work(model: Any) -> None:
        with pytest.raises(APIError, match="m@1 is a LoRA version") as refused:
            await model.draw(routed(lora))
        assert (refused.value.status, refused.value.code) == (503, "model_refused")

    # The first version is the LoRA one too, so nothing is compiled.
    with_replica(lora, work, compile=True)
