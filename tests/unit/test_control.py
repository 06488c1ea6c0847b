"""A ControlNet begins as a copy that changes nothing, and draws the picture of diffusers' pipeline."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ray_jobs.diffusion.families import CONTROLLED, FAMILIES, Family, family_of
from ray_jobs.diffusion.families.family import CONTROL, CONTROL_SCALE
from ray_jobs.diffusion.protocols import Component, Pipeline
from ray_jobs.diffusion.sampling import control_conditions, encode_prompts, sample_pictures, whole_pictures

PROMPT, SEED, STEPS, GUIDANCE, SIDE = "a red apple", 7, 3, 3.0, 64
FAMILIES_WITH_CONTROL = [pytest.param(each, id=each.pipeline_class) for each in CONTROLLED.values()]


def changing(network: Component) -> Component:
    """Give the layers that begin at 0 some weights, so that a ControlNet has an effect."""
    generator = torch.Generator().manual_seed(5)
    for parameter in network.parameters():
        if not parameter.detach().any():
            parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return network.eval()


def small_base(family: Family) -> Pipeline:
    """A small model whose autoencoder has a point for a posterior: SD3's pipeline draws from it unseeded."""
    pipeline = family.tiny([PROMPT])
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    convolution = pipeline.vae.quant_conv
    with torch.no_grad():
        convolution.weight[4:], convolution.bias[4:] = 0, -60
    return pipeline


def control_image() -> np.ndarray:
    """A control image: uint8, SIDE x SIDE x 3."""
    return np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)


def drawn(pipeline: Pipeline, picture: np.ndarray | None) -> torch.Tensor:
    """Return the picture that our sampler draws: uint8, 3 x SIDE x SIDE."""
    [batch] = sample_pictures(
        pipeline,
        [PROMPT],
        [SEED],
        shapes=[(SIDE, SIDE)],
        num_steps=STEPS,
        guidance_scale=GUIDANCE,
        batch_size=1,
        references=None if picture is None else lambda _: [as_tensor(picture)],
    )
    return batch[0]


def as_tensor(picture: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(picture).permute(2, 0, 1)


@pytest.mark.parametrize("family", FAMILIES_WITH_CONTROL)
def test_the_picture_is_the_one_that_diffusers_draws(family: Family) -> None:
    assert family.control
    base = small_base(family)
    before = dict(base.transformer.config if family.denoiser == "transformer" else base.unet.config)
    torch.manual_seed(0)
    pipeline = family.control.pipeline(base, changing(family.control.network(getattr(base, family.denoiser))))
    assert dict(getattr(base, family.denoiser).config) == before  # which diffusers' own way changes for SD3
    assert family_of(pipeline) is family and list(family.model(pipeline)) == [family.denoiser, "controlnet"]
    picture = control_image()
    name = "image" if family.control.form == "pixels" else "control_image"
    call: Any = pipeline
    theirs = call(
        PROMPT,
        **{name: Image.fromarray(picture)},
        height=SIDE,
        width=SIDE,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        generator=torch.Generator().manual_seed(SEED),
        output_type="np",
    ).images[0]
    ours = drawn(pipeline, picture)
    difference = ours.permute(1, 2, 0).float() - 255 * torch.from_numpy(theirs)
    assert difference.abs().max() < 0.55
    free = drawn(pipeline, None)
    assert (free.float() - ours.float()).abs().mean() > 5  # without a control image it draws as the base
    assert torch.equal(free, drawn(base, None))


@pytest.mark.parametrize("family", FAMILIES_WITH_CONTROL)
def test_a_control_scale_counts_for_its_row_alone(family: Family) -> None:
    assert family.control
    base = small_base(family)
    torch.manual_seed(0)
    fresh = family.control.pipeline(base, family.control.network(getattr(base, family.denoiser)))
    latents = torch.randn(3, *family.codec.shape(base.vae.config, SIDE, SIDE))
    timesteps = torch.full((3,), 500.0 if family.denoiser == "transformer" else 500)
    conditions = {
        name: each.expand(3, *each.shape[1:]) for name, each in encode_prompts(base, [PROMPT]).items()
    }
    conditions |= whole_pictures(family, 3, SIDE, SIDE)
    controlled = conditions | control_conditions(fresh, as_tensor(control_image()).expand(3, -1, -1, -1))
    with torch.no_grad():
        plain = family.denoise(family.model(base), latents, timesteps, conditions)
        assert torch.equal(plain, family.denoise(family.model(fresh), latents, timesteps, controlled))
        changing(fresh.controlnet)
        whole = family.denoise(family.model(fresh), latents, timesteps, controlled)
        scales = {CONTROL_SCALE: torch.tensor([0.0, 0.5, 1.0])}
        mixed = family.denoise(family.model(fresh), latents, timesteps, controlled | scales)
    assert torch.equal(mixed[0], plain[0]) and torch.equal(mixed[2], whole[2])
    assert not torch.allclose(mixed[1], plain[1], atol=1e-3)
    assert not torch.allclose(mixed[1], whole[1], atol=1e-3)
    assert CONTROL in controlled


def test_a_base_with_a_control_net_in_it_is_refused_with_what_to_give() -> None:
    with pytest.raises(ValueError, match=r"has a ControlNet in it; give a StableDiffusionPipe.*controlnet"):
        family_of("StableDiffusionControlNetPipeline")


def test_a_control_net_copies_at_most_the_blocks_that_there_are() -> None:
    flux, unet = FAMILIES["FluxPipeline"], FAMILIES["StableDiffusionPipeline"]
    assert flux.control and unet.control
    with pytest.raises(ValueError, match="2; this model has 1 blocks"):
        flux.control.network(flux.tiny([PROMPT]).transformer, 2)
    with pytest.raises(ValueError, match="2; a ControlNetModel has all blocks"):
        unet.control.network(unet.tiny([PROMPT]).unet, 2)


def test_a_control_net_of_another_kind_is_refused() -> None:
    from diffusers import ControlNetModel

    family = FAMILIES["StableDiffusionPipeline"]
    assert family.control
    network = ControlNetModel.from_unet(family.tiny([PROMPT]).unet, "bgr")
    with pytest.raises(ValueError, match="channel_order is bgr; only rgb is supported"):
        family.control.check(network)
    flux = FAMILIES["FluxPipeline"]
    assert flux.control
    with pytest.raises(ValueError, match="a ControlNetModel, where FluxControlNetModel is needed"):
        flux.control.check(network)
