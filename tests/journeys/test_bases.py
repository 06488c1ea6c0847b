"""Bases in published folders: the endpoint's engine draws what plain diffusers draws, without Ray."""

from pathlib import Path
from typing import Any

import pytest
import torch

from ray_jobs.weights.loading import load_pipeline
from serving.engine.engine import Engine
from serving.request import Request
from tests.journeys.bases import BASES
from tests.serving import plain_diffusers


@pytest.fixture(scope="module", params=BASES)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    return request.param, BASES[request.param](tmp_path_factory.mktemp("base") / "published")


def test_the_engine_draws_what_plain_diffusers_draws(base: tuple[str, Path]) -> None:
    name, folder = base
    plain = plain_diffusers.load(folder, variant="fp16" if "fp16" in name else None)
    engine = Engine(load_pipeline(str(folder)))
    requests = [
        Request("a small red circle", seed=5, steps=4, guidance_scale=3.0, height=64, width=96),
        Request("", seed=6, steps=5, guidance_scale=1.0, height=64, width=64),
    ]
    requests = [plain_diffusers.understood(plain, request) for request in requests]
    futures = [engine.submit(request) for request in requests]
    while engine.unfinished:
        engine.step()
    for request, future in zip(requests, futures, strict=True):
        difference = future.result(0).pixels.float() - plain_diffusers.draw(plain, request)
        assert difference.abs().max() <= 2


def test_its_own_size_is_that_of_plain_diffusers(tmp_path: Path) -> None:
    folder = BASES["a UNet that is not square"](tmp_path / "base")
    plain: Any = plain_diffusers.load(folder)
    engine = Engine(load_pipeline(str(folder)))
    future = engine.submit(Request("a small red circle", seed=5, steps=2, guidance_scale=3.0))
    while engine.unfinished:
        engine.step()
    noise = torch.Generator().manual_seed(5)
    asked = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "pt"}
    picture = plain("a small red circle", generator=noise, **asked).images[0]
    pixels = future.result(0).pixels
    assert pixels.shape == (64, 96, 3)
    assert (pixels - 255 * picture.permute(1, 2, 0)).abs().max() <= 2
