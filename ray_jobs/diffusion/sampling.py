"""Turn noise and prompt embeddings into images. Pure PyTorch; all state is in the arguments.

The arithmetic is that of diffusers' pipelines, so the same noise gives the same image here and in plain
diffusers.
"""

from collections.abc import Iterator, Sequence
from copy import deepcopy
from typing import Any

import torch

from ray_jobs.diffusion.families import Captions, Family, family_of
from ray_jobs.diffusion.objectives import latent_scale, sample_posterior


def initial_noise(seeds: Sequence[int], shape: tuple[int, int, int]) -> torch.Tensor:
    """Return standard normal noise from one generator per image: an image depends on its own seed only.

    Args:
        seeds: N seeds.
        shape: (channels, height, width) of the latents.

    Returns:
        float32, N x channels x height x width, on the CPU (the CPU's generator gives the same numbers
        everywhere).
    """
    rows = [torch.randn((1, *shape), generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.cat(rows)


@torch.no_grad()
def null_captions(pipeline: Any) -> Captions:
    """Return the denoiser's unconditional input, 1 x ..., as `Family.unconditional` defines it."""
    return family_of(pipeline).unconditional(pipeline.config, encode_prompts(pipeline, [""]))


def whole_pictures(family: Family, count: int, height: int, width: int) -> torch.Tensor | None:
    """Return the `sizes` for `Family.denoise` of N images that are neither scaled nor cropped: int64, N x 6.

    None for a family without size conditioning.
    """
    if not family.sizes:
        return None
    return torch.tensor([[height, width, 0, 0, height, width]]).expand(count, -1)


@torch.no_grad()
def sample_latents(
    family: Family,
    denoiser: torch.nn.Module,
    scheduler: Any,
    noise: torch.Tensor,
    captions: Captions,
    null_captions: Captions | None,
    *,
    num_steps: int,
    guidance_scale: float | torch.Tensor,
    sizes: torch.Tensor | None = None,
) -> torch.Tensor:
    """Denoise with classifier-free guidance or, if the denoiser takes the scale as input, distilled guidance.

    Classifier-free guidance (Ho & Salimans, arXiv 2207.12598, eq. 6) runs both halves in one batch.

    Args:
        scheduler: any diffusers scheduler; it is copied, not changed.
        noise: float, N x C x h x w, standard normal.
        captions: N embeddings from `Family.embed`.
        null_captions: one embedding from `null_captions`; not used with distilled guidance, or if every
            guidance scale is 1, which means no guidance.
        num_steps: number of denoising steps.
        guidance_scale: one scale, or a float tensor of N scales, one per image.
        sizes: int, N x 6, for families with `sizes`.

    Returns:
        Denoised latents, N x C x h x w, still in the denoiser's scale.
    """
    scheduler = deepcopy(scheduler)
    family.set_timesteps(scheduler, num_steps, noise.shape, noise.device)
    latents = noise * getattr(scheduler, "init_noise_sigma", 1.0)  # flow matching has no such scale
    scale = torch.as_tensor(guidance_scale, dtype=latents.dtype, device=latents.device).expand(len(noise))
    told = family.distilled_guidance(denoiser)
    guided = not told and bool((scale != 1).any())
    if guided:
        assert null_captions is not None
        captions = {
            name: torch.cat([null_captions[name].expand_as(captions[name]), captions[name]])
            for name in family.embeds
        }
        sizes = None if sizes is None else torch.cat([sizes, sizes])
    sizes = None if sizes is None else sizes.to(noise.device)
    for timestep in scheduler.timesteps:
        inputs = torch.cat([latents, latents]) if guided else latents
        if hasattr(scheduler, "scale_model_input"):
            inputs = scheduler.scale_model_input(inputs, timestep)
        predicted = family.denoise(
            denoiser, inputs, timestep.expand(len(inputs)), captions, sizes, scale if told else None
        )
        if guided:
            unconditional, conditional = predicted.chunk(2)
            predicted = unconditional + scale.reshape(-1, 1, 1, 1) * (conditional - unconditional)
        latents = scheduler.step(predicted, timestep, latents, return_dict=False)[0]
    return latents


@torch.no_grad()
def decode_latents(autoencoder: Any, latents: torch.Tensor) -> torch.Tensor:
    """Decode latents in the denoiser's scale to images: uint8, N x 3 x height x width, on the CPU."""
    shift, scale = (part.to(latents) for part in latent_scale(autoencoder.config))
    pixels = autoencoder.decode(latents / scale + shift, return_dict=False)[0]
    return ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).cpu()


@torch.no_grad()
def encode_pictures(autoencoder: Any, pixels: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Encode images to latents in the denoiser's scale, drawn from the autoencoder's posterior.

    Args:
        pixels: uint8, N x 3 x height x width.
        noise: float32, N x C x h x w, standard normal, on the autoencoder's device.
    """
    pictures = pixels.to(noise.device, autoencoder.dtype) / 127.5 - 1
    posterior = autoencoder.encode(pictures).latent_dist
    return sample_posterior(posterior.mean.float(), posterior.logvar.float(), autoencoder.config, noise)


def sample_pictures(
    pipeline: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    shapes: Sequence[tuple[int, int]],
    num_steps: int,
    guidance_scale: float,
    batch_size: int,
) -> Iterator[torch.Tensor]:
    """Yield the images of N prompts in batches: uint8, n x 3 x height x width, on the CPU.

    A batch has up to `batch_size` consecutive images of one shape.

    Args:
        pipeline: pipeline from `load_pipeline`, on the device to sample on.
        prompts, seeds, shapes: N of each, one per image; a shape is (height, width) in pixels.
    """
    family, factor = family_of(pipeline), pipeline.vae_scale_factor
    null = null_captions(pipeline)
    for batch in batches_of(shapes, batch_size):
        height, width = shapes[batch.start]
        shape = (pipeline.vae.config.latent_channels, height // factor, width // factor)
        noise = initial_noise(seeds[batch], shape)
        latents = sample_latents(
            family,
            getattr(pipeline, family.denoiser),
            pipeline.scheduler,
            noise.to(pipeline.device),
            encode_prompts(pipeline, list(prompts[batch])),
            null,
            num_steps=num_steps,
            guidance_scale=guidance_scale,
            sizes=whole_pictures(family, len(noise), height, width),
        )
        yield decode_latents(pipeline.vae, latents)


def batches_of(shapes: Sequence[tuple[int, int]], batch_size: int) -> list[slice]:
    """Split a sequence of images into batches of up to `batch_size` consecutive images of one shape."""
    found, start = [], 0
    for end in range(1, len(shapes) + 1):
        if end == len(shapes) or shapes[end] != shapes[start] or end - start == batch_size:
            found.append(slice(start, end))
            start = end
    return found


@torch.no_grad()
def encode_prompts(pipeline: Any, prompts: list[str], device: str | torch.device | None = None) -> Captions:
    """Encode N prompts to the denoiser's inputs: float, N x ..., by name.

    Args:
        device: device of the text encoders; None for the pipeline's.
    """
    family = family_of(pipeline)
    tokens = family.tokenize(pipeline, prompts)
    placed = {name: ids.to(device or pipeline.device) for name, ids in tokens.items()}
    return family.embed(family.encoders(pipeline), placed)
