"""Turn noise and prompt embeddings into pictures. Pure PyTorch; state in the arguments.

The arithmetic is that of diffusers' StableDiffusionPipeline, so that a picture made here and one made
by plain diffusers from the same seed are the same picture.
"""

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch


def initial_noise(seeds: Sequence[int], shape: tuple[int, int, int]) -> torch.Tensor:
    """Standard normal noise, one generator a picture: a picture depends on its own seed only.

    Args:
        seeds: N of them.
        shape: (channels, height, width) of the latents.

    Returns:
        float32, N x channels x height x width, on the CPU (the CPU's generator gives the same numbers
        everywhere).
    """
    rows = [torch.randn((1, *shape), generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.cat(rows)


@torch.no_grad()
def sample_latents(
    denoiser: torch.nn.Module,
    scheduler: Any,
    noise: torch.Tensor,
    prompt_embeds: torch.Tensor,
    null_embeds: torch.Tensor,
    *,
    num_steps: int,
    guidance_scale: float | torch.Tensor,
) -> torch.Tensor:
    """Denoise with classifier-free guidance (Ho & Salimans, arXiv 2207.12598, eq. 6).

    Args:
        denoiser: called with (latents, timestep, encoder_hidden_states=...), like UNet2DConditionModel.
        scheduler: any diffusers scheduler; a copy is stepped, the argument stays as it is.
        noise: float, N x C x H x W, standard normal.
        prompt_embeds: float, N x tokens x width.
        null_embeds: float, 1 x tokens x width, of the empty prompt.
        num_steps: denoising steps.
        guidance_scale: one, or a float tensor of N, one a picture.

    Returns:
        Denoised latents, N x C x H x W, still in the denoiser's scale.
    """
    scheduler = deepcopy(scheduler)
    scheduler.set_timesteps(num_steps, device=noise.device)
    latents = noise * scheduler.init_noise_sigma
    embeds = torch.cat([null_embeds.expand(len(noise), -1, -1), prompt_embeds])
    scale = torch.as_tensor(guidance_scale, dtype=latents.dtype, device=latents.device)
    scale = scale.reshape(-1, 1, 1, 1)
    for timestep in scheduler.timesteps:
        both = scheduler.scale_model_input(torch.cat([latents, latents]), timestep)
        predicted = denoiser(both, timestep, encoder_hidden_states=embeds, return_dict=False)[0]
        unconditional, conditional = predicted.chunk(2)
        guided = unconditional + scale * (conditional - unconditional)
        latents = scheduler.step(guided, timestep, latents, return_dict=False)[0]
    return latents


@torch.no_grad()
def decode_latents(autoencoder: Any, latents: torch.Tensor) -> torch.Tensor:
    """Latents in the denoiser's scale to pictures: uint8, N x 3 x height x width, on the CPU."""
    pixels = autoencoder.decode(latents / autoencoder.config.scaling_factor, return_dict=False)[0]
    return ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).cpu()
