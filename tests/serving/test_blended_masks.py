"""Masks with models that have none: inside is diffusers' picture, outside the one that was sent."""

import base64
import io
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import openai
import pytest
import torch
from PIL import Image

from ray_jobs.diffusion.families import Family
from ray_jobs.weights.loading import load_pipeline
from serving.engine.engine import Engine
from serving.engine.rows import Drawing
from serving.request import Request, RequestError
from tests.serving import plain_diffusers
from tests.serving.endpoint_here import endpoint_here
from tests.serving.test_served_edits import picture
from tests.tiny_models import FAMILY_MODELS

TOLERANCE = 0.55  # of a pixel's 255 levels, as in test_engine.py


def masked(seed: int, height: int, width: int) -> torch.Tensor:
    """A picture with a hole, whose sides are those of latents: uint8, height x width x 4."""
    alpha = torch.full((height, width, 1), 255, dtype=torch.uint8)
    alpha[16:48, 16:32] = 0
    return torch.cat([picture(seed, height + 15, width)[:height], alpha], dim=2)


def request_of(seed: int, steps: int, scale: float, strength: float, size: tuple[int, int]) -> Request:
    picture = masked(seed, *size)
    options: dict[str, Any] = {"image": picture[..., :3], "strength": strength, "masked": picture}
    return Request("a small red circle", seed, steps, scale, None, *size, **options)


# Pipelines of diffusers 0.42.1 that paint into masks in this way. Chroma's fails, SD3's asks for 16 channels,
# Kontext's scales the picture, and FLUX.2 Klein's takes it as a reference, too.
PLAIN = {
    "StableDiffusionPipeline": diffusers.StableDiffusionInpaintPipeline,
    "StableDiffusionXLPipeline": diffusers.StableDiffusionXLInpaintPipeline,
    "FluxPipeline": diffusers.FluxInpaintPipeline,
    "QwenImagePipeline": diffusers.QwenImageInpaintPipeline,
    "ZImagePipeline": diffusers.ZImageInpaintPipeline,
}
REQUESTS = [
    (0, request_of(1, 5, 3.0, 1.0, (64, 64))),
    (0, Request("a big blue cross", 7, 3, 2.0, None, 64, 64)),
    (1, request_of(2, 6, 1.0, 0.5, (64, 64))),
    (1, request_of(3, 4, 4.0, 0.8, (64, 96))),
]


@pytest.mark.parametrize("name", FAMILY_MODELS)
def test_what_is_painted_is_diffusers_picture_and_the_rest_is_the_one_that_was_sent(
    tiny: Callable[[str], Path], name: str
) -> None:
    engine = Engine(load_pipeline(str(tiny(name))), max_rows=6, num_cores=2)
    if engine.family.paints_masks:
        pytest.skip("it has masks of its own: test_served_masks.py")
    takes_guidance = engine.family.has_guidance(engine.pipeline.config)
    asked = [(when, each if takes_guidance else replace(each, guidance_scale=1.0)) for when, each in REQUESTS]
    futures: list[Future[Drawing]] = []
    seen: list[torch.Tensor] = []
    for call in range(2):
        futures += [engine.submit(request) for when, request in asked if when == call]
        engine.step()
    preview = replace(asked[0][1], previews=2)
    futures.append(engine.submit(preview, lambda _, pixels: seen.append(pixels)))
    engine.drain()
    requests = [*(request for _, request in asked), preview]
    plain = PLAIN[name].from_pipe(plain_diffusers.load(tiny(name))) if name in PLAIN else None
    for request, future in zip(requests, futures, strict=True):
        if request.masked is None:
            continue
        pixels, outside = future.result(0).pixels, request.masked[..., 3] != 0
        for each in (pixels, *(seen if request is preview else [])):
            assert torch.equal(each[outside], request.masked[..., :3][outside])
        assert (pixels[~outside].float() - request.masked[..., :3][~outside]).abs().max() > 2
        if plain is not None:
            expected = drawn_in(plain, request, engine.family)
            assert (pixels[~outside] - expected[~outside]).abs().max() <= TOLERANCE, request
    assert len(seen) == 2


def drawn_in(pipeline: Any, request: Request, family: Family) -> torch.Tensor:
    """The picture of a pipeline that paints into masks: float32, from 0 to 255."""
    assert request.masked is not None
    colours, alpha = request.masked.split([3, 1], dim=2)
    options: dict[str, Any] = {
        "image": colours.permute(2, 0, 1)[None] / 255,
        "mask_image": Image.fromarray(((alpha[..., 0] == 0) * 255).to(torch.uint8).numpy()),
        **family.guidance_arguments(getattr(pipeline, family.denoiser).config, request.guidance_scale),
        "strength": request.strength,
        "height": request.height,
        "width": request.width,
    }
    pipeline.set_progress_bar_config(disable=True)
    return plain_diffusers.drawn(pipeline, request, options)


def test_a_mask_without_its_picture_is_refused(tiny_model: Path) -> None:
    engine = Engine(load_pipeline(str(tiny_model)))
    with pytest.raises(RequestError, match="masked: given without image") as refused:
        engine.submit(replace(REQUESTS[0][1], image=None, strength=1.0))
    assert refused.value.field == "masked"


def test_an_edit_over_http_keeps_what_is_outside_its_mask(
    tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Also where the mask cuts through latents; in the file that is sent."""
    given, hole = picture(1, 79, 64)[:64], np.full((64, 64, 4), 255, np.uint8)
    hole[11:30, 17:50, 3] = 0
    files = [io.BytesIO(), io.BytesIO()]
    for file, pixels in zip(files, (given.numpy(), hole), strict=True):
        Image.fromarray(pixels).save(file, "PNG")
    image, mask = (file.getvalue() for file in files)
    with endpoint_here(tmp_path_factory.mktemp("here"), tiny_model) as here:
        body: dict[str, Any] = {"prompt": "a red star", "extra_body": {"seed": 1, "steps": 3}}
        answer: Any = here.client.images.edit(image=image, mask=mask, **body)
        gentle: Any = here.client.images.edit(
            image=image, mask=mask, prompt="a red star", extra_body={"seed": 1, "steps": 3, "strength": 0.4}
        )
        with pytest.raises(openai.BadRequestError, match="to /v1/images/edits") as refused:
            here.client.images.generate(prompt="a", extra_body={"mask": "x"})
    assert refused.value.param == "mask"
    outside, inside = hole[..., 3] != 0, []
    for each in (answer, gentle):
        drawn = np.array(Image.open(io.BytesIO(base64.b64decode(each.data[0].b64_json))))
        assert np.array_equal(drawn[outside], given.numpy()[outside])
        inside.append(drawn[~outside].astype(int))
        assert np.abs(inside[-1] - given.numpy()[~outside]).mean() > 2
    assert np.abs(inside[0] - inside[1]).mean() > 2
