"""Pictures that evaluation draws are those of diffusers' pipelines from the same seeds."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ray_jobs.diffusion.sampling import Prompts, decode_latents, encode_pictures, sample_pictures
from ray_jobs.weights.loading import load_pipeline
from serving.request import Request
from tests.serving import plain_diffusers
from tests.tiny_models import FAMILY_MODELS, guidance

TOLERANCE = 0.55  # of a pixel's 255 levels: half of one is rounding
STATISTICS = {
    "latents_mean": [0.3, -0.2, 0.1, 0.0],
    "latents_std": [2.0, 0.5, 1.5, 1.0],
    "scaling_factor": 0.7,
}


def drawn(pipeline: Any, guidance_scale: float) -> torch.Tensor:
    """uint8, height x width x 3."""
    options: dict[str, Any] = {"num_steps": 3, "guidance_scale": guidance_scale, "batch_size": 2}
    [[picture]] = sample_pictures(pipeline, ["a small red circle"], [5], shapes=[(64, 64)], **options)
    return picture.permute(1, 2, 0)


@pytest.mark.parametrize("zeros", [True, False])
def test_without_a_prompt_there_are_zeros_if_the_model_asks_for_them(tiny_xl: Path, zeros: bool) -> None:
    ours, theirs = load_pipeline(str(tiny_xl)), plain_diffusers.load(tiny_xl)
    for pipeline in (ours, theirs):
        pipeline.register_to_config(force_zeros_for_empty_prompt=zeros)
    expected = plain_diffusers.draw(theirs, Request("a small red circle", 5, 3, 4.0, None, 64, 64))
    assert (drawn(ours, 4.0) - expected).abs().max() <= TOLERANCE


@pytest.mark.parametrize("model", FAMILY_MODELS)
def test_pictures_of_several_shapes_are_those_of_plain_diffusers(
    tiny: Callable[[str], Path], model: str
) -> None:
    """Of Stable Diffusion XL the denoiser is told the size of each."""
    folder = tiny(model)
    shapes, plain = [(64, 64), (32, 96), (32, 96), (96, 32), (64, 64)], plain_diffusers.load(folder)
    pipeline = load_pipeline(str(folder))
    scale = guidance(pipeline, 2.0)
    batches = sample_pictures(
        pipeline,
        [f"a small red circle {number}" for number in range(5)],
        range(5),
        shapes=shapes,
        num_steps=2,
        guidance_scale=scale,
        batch_size=2,
    )
    pictures = [picture.permute(1, 2, 0) for batch in batches for picture in batch]
    assert [tuple(picture.shape[:2]) for picture in pictures] == shapes
    for number, (height, width) in enumerate(shapes):
        asked = Request(f"a small red circle {number}", number, 2, scale, None, height, width)
        assert (pictures[number] - plain_diffusers.draw(plain, asked)).abs().max() <= TOLERANCE


@pytest.mark.parametrize("scheduler", ["EulerAncestralDiscreteScheduler", "LCMScheduler", "DDPMScheduler"])
def test_schedulers_that_add_noise_draw_it_from_each_pictures_seed(tiny_model: Path, scheduler: str) -> None:
    """So a score can be repeated, whatever is drawn beside a picture."""
    import diffusers

    ours, theirs = load_pipeline(str(tiny_model)), plain_diffusers.load(tiny_model)
    for pipeline in (ours, theirs):
        pipeline.scheduler = getattr(diffusers, scheduler).from_config(pipeline.scheduler.config)
    prompts = ["a small red circle", "a big blue cross"]
    options: dict[str, Any] = {"num_steps": 3, "guidance_scale": 2.0}
    [pictures] = sample_pictures(ours, prompts, [5, 6], shapes=[(64, 64)] * 2, batch_size=2, **options)
    for picture, prompt, seed in zip(pictures, prompts, (5, 6), strict=True):
        expected = plain_diffusers.draw(theirs, Request(prompt, seed, 3, 2.0, None, 64, 64))
        assert (picture.permute(1, 2, 0) - expected).abs().max() <= TOLERANCE


@pytest.mark.parametrize(("guidance_scale", "rows"), [(1.0, 1), (2.0, 2)])
def test_guidance_of_one_takes_one_pass(
    tiny: Callable[[str], Path], guidance_scale: float, rows: int
) -> None:
    tiny_schnell = tiny("FluxPipeline-schnell")
    pipeline, batches = load_pipeline(str(tiny_schnell)), []
    pipeline.transformer.register_forward_pre_hook(lambda _, inputs: batches.append(len(inputs[0])))
    request = Request("a small red circle", 5, 3, guidance_scale, None, 64, 64)
    expected = plain_diffusers.draw(plain_diffusers.load(tiny_schnell), request)
    assert (drawn(pipeline, guidance_scale) - expected).abs().max() <= TOLERANCE
    assert batches == [rows] * 3


def test_latents_with_a_mean_and_a_spread_of_their_own_are_decoded_as_by_diffusers(tiny_xl: Path) -> None:
    ours, theirs = load_pipeline(str(tiny_xl)), plain_diffusers.load(tiny_xl)
    before = drawn(ours, 1.0)
    for pipeline in (ours, theirs):
        pipeline.vae.register_to_config(**STATISTICS)
    expected = plain_diffusers.draw(theirs, Request("a small red circle", 5, 3, 1.0, None, 64, 64))
    assert (before - expected).abs().max() > 5
    assert (drawn(ours, 1.0) - expected).abs().max() <= TOLERANCE


@pytest.mark.parametrize("statistics", [{}, STATISTICS, {"scaling_factor": 1.5, "shift_factor": 0.25}])
def test_encoded_latents_are_in_the_scale_that_is_decoded(
    tiny_model: Path, statistics: dict[str, Any]
) -> None:
    pipeline = load_pipeline(str(tiny_model))
    autoencoder = pipeline.vae
    autoencoder.register_to_config(**statistics)
    pixels = torch.randint(256, (2, 3, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    latents = encode_pictures(pipeline, pixels, torch.zeros(2, 4, 8, 8))
    with torch.no_grad():
        unscaled = autoencoder.encode(pixels / 127.5 - 1).latent_dist.mean
        expected = autoencoder.decode(unscaled).sample
    assert (decode_latents(pipeline, latents) - 127.5 * (expected.clamp(-1, 1) + 1)).abs().max() <= TOLERANCE
    assert statistics == {} or not torch.allclose(latents, unscaled)


@pytest.mark.parametrize("most", [1 << 30, 0])
def test_prompts_encoded_ahead_give_the_same_pictures(tiny_flux: Path, most: int) -> None:
    pipeline, calls = load_pipeline(str(tiny_flux)), []
    pipeline.text_encoder_2.register_forward_pre_hook(lambda *_: calls.append("encoding"))
    pipeline.transformer.register_forward_pre_hook(lambda *_: calls.append("denoising"))

    def drawn(encoded: Prompts | None) -> list[torch.Tensor]:
        prompts = ["a red circle", "a blue cross", "a green square", "a red circle", "a blue cross"]
        options: dict[str, Any] = {"num_steps": 1, "guidance_scale": 2.0, "batch_size": 2}
        return list(
            sample_pictures(pipeline, prompts, range(5), shapes=[(64, 64)] * 5, encoded=encoded, **options)
        )

    expected, prompts = drawn(None), Prompts(pipeline, "cpu", most)
    calls.clear()
    for ours, theirs in zip(drawn(prompts), expected, strict=True):
        assert ours.equal(theirs)
    turn = ["encoding", "denoising"]
    assert calls == ["encoding", *(turn * 3 if most == 0 else ["encoding"] * 3 + ["denoising"] * 3)]
    calls.clear()
    for ours, theirs in zip(drawn(prompts), expected, strict=True):
        assert ours.equal(theirs)
    assert calls == (turn * 3 if most == 0 else ["denoising"] * 3)
