"""The randomness of a training step, drawn for each picture by itself.

A picture's draws depend on the seed, the step and its place in the step's batch, and on nothing else: not on
how many workers share the batch, nor in how many pieces they take it, nor on what was drawn before. So runs
on clusters of different sizes, and resumed ones, see the same noise.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from ray_jobs.diffusion.objectives import Draws, LossSettings


@dataclass(frozen=True)
class StepDraws:
    """What is random about N pictures of a step.

    Attributes:
        loss: position, noise and what else the loss takes.
        posterior: float32, N x C x H x W, standard normal: which latents the autoencoder's posterior gives.
        caption: float32, N, uniform in [0, 1): the caption is dropped where this is below the share to drop.
    """

    loss: Draws
    posterior: torch.Tensor
    caption: torch.Tensor


def draw(
    seed: tuple[int, ...], step: int, places: Iterable[int], shape: tuple[int, ...], settings: LossSettings
) -> StepDraws:
    """The draws of the pictures at some places of a step's batch, on the CPU.

    Args:
        seed: of the run, and of the stream of pictures where there are several.
        step: counted from 1.
        places: in the batch of all workers, counted from 0.
        shape: of a picture's latents, C x H x W.
    """
    rows = [_draw_one((*seed, step, place), shape, settings) for place in places]
    uniform, posterior, noise, offset, perturbation = (list(column) for column in zip(*rows, strict=True))
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
    )


def _draw_one(
    entropy: tuple[int, ...], shape: tuple[int, ...], settings: LossSettings
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(position, caption), posterior, noise, offset, perturbation; the last two empty where they are not
    used."""
    state = np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]
    generator = torch.Generator().manual_seed(int(state >> np.uint64(1)))
    nothing = torch.empty(0)
    return (
        torch.rand(2, generator=generator),
        torch.randn(shape, generator=generator),
        torch.randn(shape, generator=generator),
        torch.randn(shape[:1], generator=generator) if settings.offset_noise else nothing,
        torch.randn(shape, generator=generator) if settings.input_perturbation else nothing,
    )
