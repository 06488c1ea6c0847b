"""Losses that learn from preferences. Pure functions of the denoising losses of each image.

A model prefers an image where it denoises it better than the reference does, from which it began: with the
same noise at the same timestep. Both losses take that difference for the log-ratio of the two models'
likelihoods, as the evidence lower bound has it. The weight of a timestep and the number of timesteps are part
of beta; with flow matching the error is that of the velocity (Liu et al., arXiv 2501.13918, section 4.2).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

PreferenceLoss = Literal["dpo", "kto"]


@dataclass(frozen=True)
class PreferenceSettings:
    """What is learned from preferences.

    Attributes:
        loss: `dpo`, from pairs of images, or `kto`, from images that are liked or not.
        beta: weight of an error that differs from the reference's: the larger, the less the model may leave
            the reference. For mean errors of latents, as in the authors' programs: 2,000 to 5,000.
    """

    loss: PreferenceLoss
    beta: float


def implicit_rewards(losses: Tensor, reference: Tensor, beta: float) -> Tensor:
    """Return how much more likely the model makes each image than its reference does: float32, N.

    beta / 2 (e_ref - e): Wallace et al., arXiv 2311.12908, eq. 14, with beta / 2 in place of
    beta T omega(lambda_t) and the mean over elements in place of the squared norm, as their program has it.

    Args:
        losses, reference: denoising losses of both models for the same noise and timestep: float32, N.
    """
    return beta / 2 * (reference - losses)


def dpo_losses(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Return -log sigmoid(r_w - r_l) of each pair: float32, N (Wallace et al., arXiv 2311.12908, eq. 14).

    Args:
        chosen, rejected: implicit rewards of the preferred and the other image of each pair: float32, N.
    """
    return -logsigmoid(chosen - rejected)


def kto_losses(rewards: Tensor, liked: Tensor, reference_point: Tensor) -> Tensor:
    """Return 1 - sigmoid(w (r - Q)) of each image: float32, N (Li et al., arXiv 2404.04465, eq. 8).

    w is 1 for a liked image and -1 for another one.

    Args:
        rewards: implicit rewards: float32, N.
        liked: bool, N.
        reference_point: Q, from `kto_reference_point`: a scalar.
    """
    sign = torch.where(liked, 1.0, -1.0)
    return torch.sigmoid(-sign * (rewards - reference_point))


def kto_reference_point(total: Tensor, count: Tensor) -> Tensor:
    """Return Q, an estimate of the divergence from the reference, without a gradient: a scalar, at least 0.

    It is the mean of the implicit rewards of a step's images (Li et al., arXiv 2404.04465, section 4.2).

    Args:
        total, count: sum and number of the rewards: scalars.
    """
    return (total / count.clamp_min(1)).clamp_min(0).detach()
