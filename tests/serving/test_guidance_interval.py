"""Guidance in some of the steps: exact, and rows of other steps leave the second half of the call."""

from pathlib import Path
from typing import Any

import pytest
import torch

from ray_jobs.weights.loading import load_pipeline
from serving.engine.engine import Engine
from serving.request import Request, RequestError
from tests.serving import plain_diffusers
from tests.serving.test_engine import TOLERANCE

PROMPT = "a small red circle"


def request_of(steps: int, start: float, end: float, scale: float = 4.0, **fields: Any) -> Request:
    return Request(PROMPT, 3, steps, scale, guidance_interval=(start, end), **fields)


@pytest.mark.parametrize("cache_features", [False, True])
def test_a_batch_mixes_intervals_and_each_row_is_what_it_is_alone(
    tiny_model: Path, cache_features: bool
) -> None:
    requests = [
        request_of(6, 0.0, 0.5),
        request_of(5, 0.4, 1.0),
        request_of(4, 0.25, 0.75),
        request_of(5, 0.0, 1.0),
        Request(PROMPT, 3, 4, 1.0),
    ]
    engine = Engine(load_pipeline(str(tiny_model)), max_rows=8, cache_features=cache_features)
    futures = [engine.submit(requests[0])]
    engine.step()
    futures += [engine.submit(each) for each in requests[1:]]
    engine.drain()
    for request, future in zip(requests, futures, strict=True):
        alone = engine.submit(request)
        engine.drain()
        assert (future.result(0).pixels.int() - alone.result(0).pixels.int()).abs().max() <= 1, request


def test_guidance_that_ends_early_is_diffusers_with_its_callback(tiny_model: Path) -> None:
    engine, plain = Engine(load_pipeline(str(tiny_model))), plain_diffusers.load(tiny_model)
    future = engine.submit(request_of(6, 0.0, 0.5))
    engine.drain()

    def end(pipeline: Any, step: int, _: object, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if step + 1 != 3:
            return given
        pipeline._guidance_scale = 1.0
        return {"prompt_embeds": given["prompt_embeds"].chunk(2)[-1]}

    options: dict[str, Any] = {"guidance_scale": 4.0, "callback_on_step_end": end}
    options["callback_on_step_end_tensor_inputs"] = ["prompt_embeds"]
    expected = plain_diffusers.drawn(plain, request_of(6, 0.0, 0.5), options)
    assert (future.result(0).pixels - expected).abs().max() <= TOLERANCE


def test_only_guided_steps_take_two_rows_and_those_before_are_unguided(tiny_model: Path) -> None:
    engine = Engine(load_pipeline(str(tiny_model)))
    rows: list[int] = []
    engine.denoiser.register_forward_pre_hook(
        lambda _, inputs, named: rows.append(len(inputs[0] if inputs else named["sample"])), with_kwargs=True
    )
    latents = []
    for request in (request_of(5, 0.4, 0.8), Request(PROMPT, 3, 5, 1.0), request_of(5, 0.0, 1.0)):
        future = engine.submit(request)
        engine.step()
        engine.step()
        latents.append(engine.scheduler.running[0].latents.clone())
        engine.drain()
        assert future.result(0)
    assert rows == [1, 1, 2, 2, 1] + 5 * [1] + 5 * [2]
    assert torch.equal(latents[0], latents[1]) and not torch.equal(latents[0], latents[2])


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (request_of(4, 0.8, 0.2), "two shares of the steps, in order"),
        (request_of(4, 0.0, 1.5), "two shares of the steps, in order"),
        (request_of(4, 0.0, 0.5, scale=1.0), "needs a guidance scale above 1"),
    ],
)
def test_what_is_no_interval_is_refused(tiny_model: Path, request_: Request, reason: str) -> None:
    with pytest.raises(RequestError, match=reason) as refused:
        Engine(load_pipeline(str(tiny_model))).submit(request_)
    assert refused.value.field == "guidance_interval"
