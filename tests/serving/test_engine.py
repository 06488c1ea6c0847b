"""Each request's picture is the one of the diffusers pipeline alone, whatever else the engine is drawing."""

from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from ray_jobs.weights.loading import load_pipeline
from serving.engine.engine import Engine
from serving.engine.rows import Drawing
from serving.engine.scheduler import QueueFull
from serving.request import Request, RequestError
from tests.serving import plain_diffusers
from tests.tiny_models import BY_NAME, MODELS

TOLERANCE = 0.55
"""Of a pixel's 255 levels: half of one for rounding, and a tenth of that for the arithmetic of a batch."""

SD = "StableDiffusionPipeline"
UNETS = ("DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler")
OF_STABLE_DIFFUSION_1_5 = {"skip_prk_steps": True, "steps_offset": 1, "set_alpha_to_one": False}
SQUARE, WIDE = (64, 64), (32, 64)
# By when they join. Guidance and none, several step counts, one seed twice.
MIXED = [
    (0, Request("a small red circle", 0, 5, 3.0, None, *SQUARE)),
    (0, Request("a big blue cross", 7, 3, 1.0, None, *SQUARE)),
    (1, Request("a big blue cross", 7, 4, 7.5, None, *WIDE)),
    (2, Request("", 2**31 - 1, 3, 2.0, "a big purple square", *SQUARE)),
    (4, Request("a small red circle", 0, 1, 3.0, None, *WIDE)),
    (5, Request("a small red circle", 3, 2, 1.0, None, *WIDE)),
]


def with_scheduler(pipeline: Any, name: str | None, **options: Any) -> Any:
    import diffusers

    if name:
        pipeline.scheduler = getattr(diffusers, name).from_config(pipeline.scheduler.config, **options)
    return pipeline


def engine_of(folder: Path, scheduler: str | None = None, **options: Any) -> Engine:
    return Engine(with_scheduler(load_pipeline(str(folder)), scheduler), **options)


def steps_of(engine: Engine, number: int) -> None:
    for _ in range(number):
        engine.step()


def drawn(engine: Engine, *requests: Request) -> list[torch.Tensor]:
    futures = [engine.submit(request) for request in requests]
    engine.drain()
    return [future.result(0).pixels for future in futures]


@pytest.mark.parametrize(
    ("model", "scheduler", "num_cores"),
    [
        *((*each, None) for each in product((SD, "StableDiffusionXLPipeline"), UNETS)),
        (SD, "PNDMScheduler", None),
        (SD, "DDIMScheduler", 2),
        ("StableDiffusionXLPipeline", "EulerDiscreteScheduler", 3),
        ("StableDiffusion3Pipeline", "DPMSolverMultistepScheduler", None),
        *((name, None, 2) for name in MODELS if not BY_NAME[name][0].is_unet),
    ],
)
def test_every_row_of_a_changing_batch_is_the_picture_of_plain_diffusers(
    tiny: Callable[[str], Path], model: str, scheduler: str | None, num_cores: int | None
) -> None:
    flow = not BY_NAME[model][0].is_unet
    options = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"} if flow and scheduler else {}
    options |= OF_STABLE_DIFFUSION_1_5 if scheduler == "PNDMScheduler" else {}
    folder = tiny(model)
    plain = with_scheduler(plain_diffusers.load(folder), scheduler, **options)
    pipeline = with_scheduler(load_pipeline(str(folder)), scheduler, **options)
    engine = Engine(pipeline, max_rows=4, num_cores=num_cores)
    requests = [(call, plain_diffusers.understood(pipeline, request)) for call, request in MIXED]
    if plain.scheduler.config.get("shift_terminal"):  # one step would be the first and the last, 0 / 0
        requests = [(call, replace(request, steps=max(request.steps, 2))) for call, request in requests]
    futures: list[Future[Drawing]] = []
    for call in range(6):
        futures += [engine.submit(request) for when, request in requests if when == call]
        engine.step()
    engine.drain()
    (alone,) = drawn(engine, requests[0][1])
    for (_, request), future in zip(requests, futures, strict=True):
        expected = plain_diffusers.draw(plain, request)
        assert future.result(0).pixels.shape == expected.shape
        assert (future.result(0).pixels - expected).abs().max() <= TOLERANCE, request
    assert (alone - plain_diffusers.draw(plain, requests[0][1])).abs().max() <= TOLERANCE


def test_seed_prompt_guidance_and_negative_prompt_each_change_the_picture(tiny_model: Path) -> None:
    base = Request("a small red circle", 1, 4, 5.0)
    others = [
        replace(base, seed=2),
        replace(base, prompt="a big blue cross"),
        replace(base, guidance_scale=1.0),
        replace(base, negative_prompt="a big blue cross"),
    ]
    first, *rest = drawn(engine_of(tiny_model), base, *others)
    for request, picture in zip(others, rest, strict=True):
        assert (first.float() - picture.float()).abs().max() > 2, request


def test_rows_of_one_size_share_a_call_and_only_guided_ones_are_doubled(tiny_model: Path) -> None:
    engine = engine_of(tiny_model, max_rows=4)
    batches: list[int] = []
    engine.denoiser.register_forward_pre_hook(lambda _, inputs: batches.append(len(inputs[0])))
    drawn(engine, Request("a", 0, 2, 3.0), Request("a", 1, 3, 1.0), Request("b", 2, 1, 1.0))
    assert batches == [4, 3, 1]


def test_a_row_joins_between_the_steps_of_another_and_overtakes_it(tiny_model: Path) -> None:
    engine = engine_of(tiny_model)
    long = engine.submit(Request("a", 0, 20, 1.0))
    steps_of(engine, 3)
    short = engine.submit(Request("a", 1, 2, 1.0))
    steps_of(engine, 2)
    assert short.done() and not long.done()
    assert engine.load().calls == 5


def test_requests_are_let_in_first_come_first_served_up_to_max_rows(tiny_model: Path) -> None:
    engine = engine_of(tiny_model, max_rows=2)
    order: list[int] = []
    for number in range(5):
        future = engine.submit(Request("a", number, 2, 1.0))
        future.add_done_callback(partial(lambda number, _: order.append(number), number))
    engine.step()
    assert (engine.load().waiting, engine.load().running) == (3, 2)
    engine.drain()
    assert order == [0, 1, 2, 3, 4]


def test_every_row_steps_at_least_once_in_as_many_calls_as_there_are_sizes(tiny_model: Path) -> None:
    """A simulation: requests of three sizes keep coming, those of one size far more often than others."""
    engine = engine_of(tiny_model, max_rows=6)
    generator = torch.Generator().manual_seed(0)
    sizes = [(32, 32), (32, 16), (16, 16)]
    previous: dict[int, tuple[int, int]] = {}  # by arrival: steps done, and in which call the last one was
    waits: list[int] = []
    for _ in range(80):
        if engine.load().waiting < 3:
            kind = int(torch.multinomial(torch.tensor([0.8, 0.15, 0.05]), 1, generator=generator))
            steps = int(torch.randint(2, 9, (), generator=generator))
            engine.submit(Request("a", 0, steps, 1.0, height=sizes[kind][0], width=sizes[kind][1]))
        engine.step()
        for row in engine.scheduler.running:
            before = previous.get(row.arrival)
            if before is not None and row.done == before[0]:
                waits.append(engine.load().calls - row.last_call)
            previous[row.arrival] = (row.done, row.last_call)
    assert 0 < max(waits) <= len(sizes) - 1


def test_a_cancelled_request_leaves_before_the_next_step_wherever_it_is(tiny_model: Path) -> None:
    engine = engine_of(tiny_model, max_rows=1)
    running, waiting, kept = (engine.submit(Request("a", seed, 4, 1.0)) for seed in range(3))
    steps_of(engine, 2)
    assert running.cancel() and waiting.cancel()
    engine.step()
    assert engine.load().running == 1 and engine.load().waiting == 0
    engine.drain()
    assert kept.result(0).pixels.shape == (64, 64, 3)
    assert engine.load().calls == 2 + 4
    with pytest.raises(CancelledError):
        running.result(0)


def test_previews_are_the_predicted_pictures_on_the_way(tiny_model: Path) -> None:
    engine = engine_of(tiny_model)
    previews: list[tuple[int, torch.Tensor]] = []
    request = Request("a small red circle", 0, 8, 3.0, previews=3)
    shown = engine.submit(request, lambda done, picture: previews.append((done, picture)))
    other = engine.submit(replace(request, previews=0))
    engine.drain()
    assert [done for done, _ in previews] == [2, 4, 6]
    assert torch.equal(shown.result(0).pixels, other.result(0).pixels)
    errors = [(picture.float() - shown.result(0).pixels).abs().mean() for _, picture in previews]
    assert errors[0] > errors[1] > errors[2] > 0


def test_decoding_holds_up_the_steps_of_others_by_a_chunk_at_most(tiny_model: Path) -> None:
    engine = engine_of(tiny_model, max_rows=6, decode_rows=2)
    chunks: list[int] = []
    decode = engine.pipeline.vae.decoder
    decode.register_forward_pre_hook(lambda _, inputs: chunks.append(len(inputs[0])))
    long = engine.submit(Request("a", 0, 6, 1.0))
    short = [engine.submit(Request("a", seed, 1, 1.0)) for seed in range(5)]
    for calls in range(1, 4):
        engine.step()
        assert engine.load().calls == calls and len(chunks) == calls
    assert chunks == [2, 2, 1] and all(each.done() for each in short) and not long.done()


def test_finished_pictures_that_wait_to_be_decoded_are_bounded(tiny_model: Path) -> None:
    engine = engine_of(tiny_model, max_rows=3, decode_rows=1)
    futures = [engine.submit(Request("a", seed, 1, 1.0)) for seed in range(20)]
    most = 0
    while engine.unfinished:
        engine.step()
        most = max(most, engine.load().decoding)
    assert most <= 2 * engine.scheduler.max_rows and all(future.done() for future in futures)


def test_an_error_in_a_step_fails_its_requests_and_the_engine_goes_on(tiny_model: Path) -> None:
    engine = engine_of(tiny_model)
    other = engine.submit(Request("a", 0, 4, 1.0, height=32, width=32))
    engine.step()
    lost = engine.submit(Request("a", 0, 4, 1.0))

    def burn(_: Any, inputs: tuple[torch.Tensor]) -> None:
        if inputs[0].shape[-1] == 8:
            raise RuntimeError("out of memory")

    hook = engine.denoiser.register_forward_pre_hook(burn)
    engine.drain()
    hook.remove()
    with pytest.raises(RuntimeError, match="out of memory"):
        lost.result(0)
    assert other.result(0).pixels.shape == (32, 32, 3)
    assert drawn(engine, Request("a", 0, 1, 1.0))[0].shape == (64, 64, 3)


def test_rows_for_which_memory_is_too_small_together_are_drawn_apart(tiny_model: Path) -> None:
    """In every component; and the next step does not try all rows together again."""
    requests = [Request("a", seed, 3, 1.0) for seed in range(4)]
    expected = drawn(engine_of(tiny_model, max_rows=4), *requests)
    engine = engine_of(tiny_model, max_rows=4, decode_rows=4)
    seen: dict[str, list[int]] = {"denoiser": [], "decoder": [], "text encoder": []}

    def small(name: str, most: int) -> Callable[..., None]:
        def check(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            rows = len(args[0] if args else kwargs["input_ids"])
            seen[name].append(rows)
            if rows > most:
                raise torch.OutOfMemoryError("CUDA out of memory")

        return check

    pipeline = engine.pipeline
    for name, module, most in (
        ("denoiser", engine.denoiser, 2),
        ("decoder", pipeline.vae.decoder, 1),
        ("text encoder", pipeline.text_encoder, 1),
    ):
        module.register_forward_pre_hook(small(name, most), with_kwargs=True)
    for mine, right in zip(drawn(engine, *requests), expected, strict=True):
        assert (mine.float() - right.float()).abs().max() <= 1
    assert seen["denoiser"] == [4, *[2] * 6]
    assert seen["decoder"] == [4, 2, 1, 1, 1, 1]
    assert engine.failures == 0


def test_an_error_in_a_callers_preview_is_the_callers_alone(tiny_model: Path) -> None:
    engine = engine_of(tiny_model)

    def refuse(done: int, picture: torch.Tensor) -> None:
        raise ConnectionError("gone")

    failing = engine.submit(Request("a", 0, 4, 1.0, previews=1), refuse)
    beside = engine.submit(Request("a", 0, 4, 1.0))
    engine.drain()
    with pytest.raises(ConnectionError):
        failing.result(0)
    assert beside.result(0).pixels.shape == (64, 64, 3)


@pytest.mark.parametrize("reserve", [False, True])
def test_prompt_embeddings_are_kept_and_the_oldest_are_dropped(tiny_model: Path, reserve: bool) -> None:
    size = 3 * 16 * 32 * 4  # three of 16 tokens, 32 wide
    engine = engine_of(tiny_model, prompt_bytes=size, reserve_prompts=reserve)
    encoded: list[int] = []
    engine.pipeline.text_encoder.register_forward_pre_hook(
        lambda _, inputs, named: encoded.append(len((inputs or (named.get("input_ids"),))[0])),
        with_kwargs=True,
    )
    first = drawn(engine, Request("a", 0, 1, 3.0), Request("b", 0, 1, 3.0))  # a, b and the empty one
    assert encoded == [3]
    again = drawn(engine, Request("b", 0, 1, 3.0), Request("a", 0, 1, 3.0))
    assert encoded == [3] and torch.equal(again[1], first[0])
    drawn(engine, Request("c", 0, 1, 1.0))  # drops the empty prompt or b: whichever came first
    drawn(engine, Request("a", 0, 1, 1.0))
    assert encoded == [3, 1]
    drawn(engine, Request("b", 0, 1, 1.0))
    assert encoded == [3, 1, 1]


def test_memory_of_prompts_is_taken_once_and_no_row_sees_another_ones_slot(tiny_model: Path) -> None:
    """Rows of more prompts than slots run together, and each is what it is alone."""
    one = 16 * 32 * 4
    engine = engine_of(tiny_model, prompt_bytes=4 * one, reserve_prompts=True, max_rows=6)
    requests = [Request(text, 0, 3, 3.0) for text in "abcdef"]
    for _ in range(2):
        futures = [engine.submit(request) for request in requests]
        for _ in range(3):
            engine.step()
            engine.submit(Request("another", 0, 1, 1.0))
        engine.drain()
        plain = engine_of(tiny_model)
        for request, future in zip(requests, futures, strict=True):
            (alone,) = drawn(plain, request)
            assert (future.result(0).pixels.float() - alone.float()).abs().max() <= 1
        slots = engine.prompts._slots
        assert slots.num_bytes == one and len(slots._free) + len(slots._taken) == 4


@pytest.mark.parametrize(
    ("model", "fields", "told"),
    [
        (SD, {"steps": 0}, "steps: 0"),
        (SD, {"steps": 1001}, "cannot sample in 1001 steps"),
        (SD, {"guidance_scale": 0.5}, "guidance_scale: 0.5"),
        (SD, {"guidance_scale": float("nan")}, "guidance_scale: nan"),
        (SD, {"seed": 2**64}, "seed: "),
        (SD, {"prompt": "\ud800"}, "prompt: contains an unpaired surrogate"),
        (SD, {"height": 60}, "height: 60; must be a multiple of 8 pixels"),
        (SD, {"adapter": "dogs"}, "adapter: 'dogs'; this model is served without"),
        (SD, {"previews": 2}, "previews: 2"),
        (
            "StableDiffusion3Pipeline",
            {"width": 72},
            "width: 72; must be a multiple of 16 .*most 128",
        ),
        ("StableDiffusion3Pipeline", {"width": 144}, "width: 144"),
        (SD, {"width": 136}, "width: 136; must be at most 128 pixels"),
        ("FluxPipeline", {"height": 72}, "height: 72; must be a multiple of 16 pixels"),
        (
            "FluxPipeline",
            {"negative_prompt": "a"},
            "negative_prompt: not supported: this model",
        ),
        (
            "Ideogram4Pipeline",
            {"negative_prompt": "a"},
            "negative_prompt: not supported: guidance leads this model away",
        ),
    ],
)
def test_what_a_model_cannot_draw_is_refused_before_it_joins_a_batch(
    tiny: Callable[[str], Path], model: str, fields: dict[str, Any], told: str
) -> None:
    engine = engine_of(tiny(model), "DDIMScheduler" if model == SD else None)
    with pytest.raises(RequestError, match=told) as refused:
        engine.submit(replace(Request("a", 0, 4, 3.0), **fields))
    assert [refused.value.field] == list(fields)
    assert not engine.unfinished


def test_more_requests_than_may_wait_are_refused_and_counted(tiny_model: Path) -> None:
    engine = engine_of(tiny_model, max_rows=2, max_waiting=3)
    futures = [engine.submit(Request("a", seed, 4, 1.0)) for seed in range(5)]  # two of them have a place
    with pytest.raises(QueueFull, match="5 requests are waiting"):
        engine.submit(Request("a", 5, 4, 1.0))
    engine.step()
    with pytest.raises(QueueFull, match="3 requests are waiting"):
        engine.submit(Request("a", 5, 4, 1.0))
    assert engine.load().rejected == 2 and engine.load().waiting == 3
    futures[4].cancel()  # before the next step it makes room
    kept = engine.submit(Request("a", 6, 4, 1.0))
    engine.drain()
    assert kept.result(0) and all(future.done() for future in futures)
    assert engine.load().rejected == 2


def test_the_load_tells_places_and_how_long_rows_waited_for_their_first_step(tiny_model: Path) -> None:
    engine = engine_of(tiny_model, max_rows=2)
    futures = [engine.submit(Request("a", seed, 3, 1.0)) for seed in range(3)]
    engine.step()
    assert (engine.load().places, engine.load().first_steps, engine.load().waiting) == (2, 2, 1)
    engine.drain()
    load, waited = engine.load(), sum(future.result(0).waited_s for future in futures)
    assert load.first_steps == 3 and load.seconds_to_first_step == pytest.approx(waited)


def test_the_bound_on_a_side_can_be_set(tiny_model: Path) -> None:
    engine = engine_of(tiny_model, max_side=64)
    with pytest.raises(ValueError, match="height: 72; must be at most 64 pixels"):
        engine.submit(Request("a", 0, 1, 1.0, height=72))


def test_the_resolution_is_the_models_own(tiny_model: Path) -> None:
    engine = engine_of(tiny_model)
    (picture,) = drawn(engine, Request("a", 0, 1, 3.0))
    assert picture.shape == (*engine.own_size, 3)


def test_a_scheduler_that_draws_noise_is_refused_with_those_that_are_served(tiny_model: Path) -> None:
    with pytest.raises(ValueError, match="EulerAncestralDiscreteScheduler cannot be served, only DDIM"):
        engine_of(tiny_model, "EulerAncestralDiscreteScheduler")


def test_a_step_count_that_the_scheduler_cannot_do_is_told_beforehand(tiny_model: Path) -> None:
    engine = engine_of(tiny_model, "DDIMScheduler")
    engine.check_steps(4)
    with pytest.raises(ValueError, match="cannot sample in 1001 steps"):
        engine.check_steps(1001)
