"""Given pictures on their way to the latents that their rows begin with (SDEdit, arXiv 2108.01073)."""

from collections.abc import Sequence
from typing import Any

import torch

from ray_jobs.diffusion.sampling import encode_pictures
from serving.rows import Row


def next_chunk(rows: Sequence[Row], most: int) -> list[Row]:
    """Which rows are encoded together: the longest waiting, and others of its size."""
    return [row for row in rows if row.size == rows[0].size][:most]


def encode(autoencoder: Any, rows: Sequence[Row], device: str) -> None:
    """Give rows of one size, each with an image, the latents that they begin with.

    As in diffusers' pipelines a row's seed draws first which latents the autoencoder's posterior gives, then
    the noise that is added to them.
    """
    draws = [_two_draws(row.request.seed, row.latents.shape) for row in rows]
    posterior, noise = (torch.stack(column).to(device) for column in zip(*draws, strict=True))
    images = torch.stack([row.request.image for row in rows if row.request.image is not None])
    latents = encode_pictures(autoencoder, images.permute(0, 3, 1, 2), posterior)
    for i, row in enumerate(rows):
        row.latents = row.schedule.image_scale * latents[i] + row.schedule.noise_scale * noise[i]


def _two_draws(seed: int, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn((1, *shape), generator=generator)[0]
    return first, torch.randn((1, *shape), generator=generator)[0]
