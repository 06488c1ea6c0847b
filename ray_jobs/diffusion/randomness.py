"""The random draws of a training step, made separately for each image.

An image's draws depend only on the seed, the step and the image's place in the step's batch: not on the
number of workers, nor on the number of pieces, nor on earlier draws. So runs on clusters of different sizes,
and resumed runs, see the same noise.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from ray_jobs.diffusion.objectives import Draws, LossSettings


@dataclass(frozen=True)
class StepDraws:
    """The random draws for N images of a step.

    Attributes:
        loss: position, noise and the loss's other draws.
        posterior: float32, N x C x ..., standard normal: noise that samples the autoencoder's posterior.
        caption: float32, N, uniform in [0, 1): a caption is dropped where this is below the dropout rate.
        masked: as `posterior`, of the masked pictures; None without them.
    """

    loss: Draws
    posterior: torch.Tensor
    caption: torch.Tensor
    masked: torch.Tensor | None = None


def draw(
    seed: tuple[int, ...],
    step: int,
    places: Iterable[int],
    shape: tuple[int, ...],
    settings: LossSettings,
    *,
    posterior_shape: tuple[int, ...] | None = None,
    with_masked: bool = False,
) -> StepDraws:
    """Return the draws for the images at the given places of a step's batch, on the CPU.

    Args:
        seed: seed of the run, and of the image stream if there are several.
        step: training step, counted from 1.
        places: positions in the batch of all workers, counted from 0.
        shape: shape of an image's latents as the denoiser receives them, C x ...
        posterior_shape: their shape in the autoencoder's posterior; None: the same.
        with_masked: draw for masked pictures too.
    """
    drawn = posterior_shape or shape
    rows = [_draw_one((*seed, step, place), shape, drawn, settings, with_masked) for place in places]
    uniform, posterior, noise, offset, perturbation, masked = (
        list(column) for column in zip(*rows, strict=True)
    )
    positions = torch.stack(uniform)
    return StepDraws(
        Draws(
            positions[:, 0],
            torch.stack(noise),
            torch.stack(offset) if settings.offset_noise else None,
            torch.stack(perturbation) if settings.input_perturbation else None,
        ),
        torch.stack(posterior),
        positions[:, 1],
        torch.stack(masked) if with_masked else None,
    )


def _draw_one(
    entropy: tuple[int, ...],
    shape: tuple[int, ...],
    posterior_shape: tuple[int, ...],
    settings: LossSettings,
    with_masked: bool,
) -> tuple[torch.Tensor, ...]:
    """Return (position, caption), posterior, noise, offset, perturbation, masked; empty if not used."""
    state = np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]
    generator = torch.Generator().manual_seed(int(state >> np.uint64(1)))
    nothing = torch.empty(0)
    return (
        torch.rand(2, generator=generator),
        torch.randn(posterior_shape, generator=generator),
        torch.randn(shape, generator=generator),
        torch.randn(shape[:1], generator=generator) if settings.offset_noise else nothing,
        torch.randn(shape, generator=generator) if settings.input_perturbation else nothing,
        torch.randn(posterior_shape, generator=generator) if with_masked else nothing,
    )
