"""Training objectives and the denoising loss. Pure functions of tensors.

All randomness is passed in as `Draws`, so a loss depends on its arguments alone.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from ray_jobs.diffusion.schedulers import flow_shift

SMALLEST_SHARE = 1e-3  # of an image: smaller masks do not weigh each latent more

Denoise = Callable[[Tensor, Tensor], Tensor]  # (noisy latents, timesteps) -> prediction of the latents' shape


@dataclass(frozen=True)
class Draws:
    """Random draws for a batch of N images; all float32."""

    position: Tensor  # N, uniform in [0, 1): position on the schedule
    noise: Tensor  # N x C x ..., standard normal
    offset: Tensor | None = None  # N x C, standard normal; needed for offset noise
    perturbation: Tensor | None = None  # N x C x ..., standard normal; needed for input perturbation


@dataclass(frozen=True)
class LossSettings:
    """Deviations of the loss from the plain squared error; the defaults are none."""

    timestep_sampling: str | None = None  # "uniform" or "logit_normal"; None: the objective's own
    timestep_mean: float = 0.0  # of the logit-normal density
    timestep_std: float = 1.0  # of the logit-normal density, > 0
    min_snr_gamma: float | None = None  # > 0; arXiv 2303.09556
    offset_noise: float = 0.0  # strength, >= 0
    input_perturbation: float = 0.0  # strength, >= 0; gamma of arXiv 2301.11706
    huber_delta: float | None = None  # > 0, in units of the prediction; None: squared error
    outside_mask: float = 0.0  # weight of what is outside of an image's mask, 0 to 1


class Objective(ABC):
    """A training objective: the noising of latents and the denoiser's target.

    Latents, noise and targets are float32, N x C x ...; positions and timesteps are N.
    """

    prediction_type: str
    num_timesteps: int
    default_sampling: str  # "uniform" or "logit_normal"

    @abstractmethod
    def timesteps(self, position: Tensor) -> Tensor:
        """Map positions in (0, 1), from clean to noisy, to the timesteps that the denoiser receives."""

    @abstractmethod
    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return the noisy latents x_t of the latents x_0."""

    @abstractmethod
    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return the denoiser's target for x_t."""

    def weight(self, timesteps: Tensor, settings: LossSettings) -> Tensor:
        """Return the weight of each image's loss: float32, N."""
        return torch.ones(len(timesteps), device=timesteps.device)

    def to(self, device: str | torch.device) -> Self:
        """Return this objective for tensors on `device`."""
        return self

    def check(self, settings: LossSettings) -> None:
        """Reject settings that this objective does not support.

        Raises:
            ValueError: a setting is not supported; the message names `train.loss.<field>`.
        """
        sampling = settings.timestep_sampling or self.default_sampling
        if sampling not in ("uniform", "logit_normal"):
            raise ValueError(
                f"train.loss.timestep_sampling: {sampling!r} is not uniform or logit_normal; "
                "leave it empty for the model's own"
            )
        if sampling == "uniform" and (settings.timestep_mean, settings.timestep_std) != (0.0, 1.0):
            raise ValueError(
                "train.loss.timestep_mean, train.loss.timestep_std: uniform sampling has no such "
                "settings; set train.loss.timestep_sampling: logit_normal, or leave both out"
            )


class Diffusion(Objective):
    """Diffusion over a variance-preserving noise schedule (Ho et al., arXiv 2006.11239).

    Args:
        alphas_cumprod: alpha-bar, float32, one per timestep: the remaining share of the signal's variance.
        prediction_type: `epsilon`, `sample` or `v_prediction`.

    Raises:
        ValueError: the prediction type is another one.
    """

    default_sampling = "uniform"

    def __init__(self, alphas_cumprod: Tensor, prediction_type: str) -> None:
        if prediction_type not in ("epsilon", "sample", "v_prediction"):
            raise ValueError(
                f"model.base: prediction_type {prediction_type!r} of its scheduler is not one of epsilon, "
                "sample, v_prediction; choose another model or correct its scheduler_config.json"
            )
        self.alphas_cumprod, self.prediction_type = alphas_cumprod, prediction_type
        self.num_timesteps = len(alphas_cumprod)

    @classmethod
    def from_scheduler(cls, scheduler_config: dict[str, Any], *, zero_terminal_snr: bool = False) -> Self:
        """Return the objective that a diffusers scheduler's configuration defines.

        Args:
            zero_terminal_snr: rescale the schedule so that its last step is pure noise.

        Raises:
            ValueError: no beta schedule, an unknown prediction type, or zero terminal SNR for epsilon.
        """
        from diffusers import DDPMScheduler

        if "beta_schedule" not in scheduler_config:
            raise ValueError("model.base: its scheduler has no beta_schedule; choose a diffusion model")
        scheduler = DDPMScheduler.from_config(scheduler_config)
        alphas_cumprod, prediction_type = scheduler.alphas_cumprod, scheduler.config.prediction_type
        if zero_terminal_snr:
            if prediction_type == "epsilon":
                raise ValueError(
                    "train.loss.zero_terminal_snr: the last step is then pure noise, from which a model "
                    "that predicts epsilon learns nothing; choose a v_prediction model or turn it off"
                )
            alphas_cumprod = rescale_to_zero_terminal_snr(alphas_cumprod)
        return cls(alphas_cumprod, prediction_type)

    def to(self, device: str | torch.device) -> Self:
        return type(self)(self.alphas_cumprod.to(device), self.prediction_type)

    def timesteps(self, position: Tensor) -> Tensor:
        """Return int64 timesteps, 0 to num_timesteps - 1: each covers an equal part of (0, 1)."""
        return (position * self.num_timesteps).long()

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return x_t = sqrt(alpha-bar) x_0 + sqrt(1 - alpha-bar) noise (arXiv 2006.11239, eq. 4)."""
        signal = per_row(self.alphas_cumprod[timesteps], latents)
        return signal.sqrt() * latents + (1 - signal).sqrt() * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return the noise (`epsilon`), x_0 (`sample`) or the velocity (`v_prediction`).

        The velocity is sqrt(alpha-bar) noise - sqrt(1 - alpha-bar) x_0 (Salimans & Ho, arXiv 2202.00512,
        appendix D).
        """
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return latents
        signal = per_row(self.alphas_cumprod[timesteps], latents)
        return signal.sqrt() * noise - (1 - signal).sqrt() * latents

    def snr(self, timesteps: Tensor) -> Tensor:
        """Return the signal-to-noise ratio alpha-bar / (1 - alpha-bar): float32, N."""
        signal = self.alphas_cumprod[timesteps]
        return signal / (1 - signal)

    def weight(self, timesteps: Tensor, settings: LossSettings) -> Tensor:
        """Return the min-SNR weight: float32, N (Hang et al., arXiv 2303.09556, section 3.4).

        min(SNR, gamma) weights the error of x_0. For the error of the prediction it is divided by SNR
        (epsilon) or SNR + 1 (velocity). At SNR 0 the weight is 1 for epsilon and 0 for the others.
        """
        gamma = settings.min_snr_gamma
        if gamma is None:
            return super().weight(timesteps, settings)
        snr = self.snr(timesteps)
        if self.prediction_type == "epsilon":
            return (gamma / snr).clamp(max=1)  # min(SNR, gamma) / SNR would be 0 / 0 at SNR 0
        weight = snr.clamp(max=gamma)
        return weight / (snr + 1) if self.prediction_type == "v_prediction" else weight


class FlowMatching(Objective):
    """Rectified flow: a straight line from latents to noise (Esser et al., arXiv 2403.03206, eq. 13).

    Args:
        num_timesteps: timestep that stands for pure noise.
        shift: shifts timesteps towards more noise for larger images (arXiv 2403.03206, eq. 23); 1 for none.
    """

    prediction_type = "flow_prediction"
    default_sampling = "logit_normal"

    def __init__(self, num_timesteps: int = 1000, shift: float = 1.0) -> None:
        self.num_timesteps, self.shift = num_timesteps, shift

    @classmethod
    def from_scheduler(cls, scheduler_config: Mapping[str, Any]) -> Self:
        """Return the objective that a diffusers scheduler's configuration defines.

        Dynamic shifting, by the image's size, applies to sampling only; the shift here is then 1.

        Raises:
            ValueError: the configuration is not for flow matching.
        """
        shift = flow_shift(scheduler_config)
        if scheduler_config.get("use_dynamic_shifting"):
            shift = 1.0
        return cls(scheduler_config["num_train_timesteps"], shift)

    def timesteps(self, position: Tensor) -> Tensor:
        """Return num_timesteps * sigma, float32, with sigma = shift u / (1 + (shift - 1) u) at position u.

        Source: arXiv 2403.03206, eq. 23.
        """
        return self.shift * position / (1 + (self.shift - 1) * position) * self.num_timesteps

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return x_t = (1 - sigma) x_0 + sigma noise (arXiv 2403.03206, eq. 13)."""
        sigma = per_row(timesteps / self.num_timesteps, latents)
        return (1 - sigma) * latents + sigma * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return noise - x_0, the derivative of x_t by sigma (Liu et al., arXiv 2209.03003, eq. 1)."""
        return noise - latents

    def check(self, settings: LossSettings) -> None:
        super().check(settings)
        if settings.min_snr_gamma is not None:
            raise ValueError(
                "train.loss.min_snr_gamma: flow matching has no min-SNR weight; leave it empty, and "
                "shift the timesteps with train.loss.timestep_mean and train.loss.timestep_std instead"
            )


def per_row(values: Tensor, latents: Tensor) -> Tensor:
    """Reshape N values for arithmetic with latents, N x ..."""
    return values.reshape(-1, *[1] * (latents.dim() - 1))


def rescale_to_zero_terminal_snr(alphas_cumprod: Tensor) -> Tensor:
    """Shift and scale sqrt(alpha-bar) so that its last value becomes 0 and its first stays unchanged.

    Source: Lin et al., arXiv 2305.08891, algorithm 1.
    """
    root = alphas_cumprod.sqrt()
    first, last = root[0], root[-1]
    return ((root - last) * (first / (first - last))).square()


def density(position: Tensor, settings: LossSettings, default: str) -> Tensor:
    """Map uniform quantiles to positions with the chosen density, strictly inside (0, 1).

    Logit-normal: sigmoid(mean + std * z) with standard normal z has the density of arXiv 2403.03206, eq. 19;
    here z is the normal quantile of `position`.

    Args:
        position: float32, N, in [0, 1).
        default: the objective's own sampling, used if the settings name none.
    """
    if (settings.timestep_sampling or default) == "logit_normal":
        normal = torch.special.ndtri(position)
        position = torch.sigmoid(settings.timestep_mean + settings.timestep_std * normal)
    # 1 - 2^-24 is the largest float32 below 1; 0 moves by less than a float32 uniform draw's step, 2^-24.
    return position.clamp(2**-25, 1 - 2**-24)


def pointwise_error(prediction: Tensor, target: Tensor, huber_delta: float | None) -> Tensor:
    """Return each element's squared error or, if `huber_delta` is given, its pseudo-Huber loss.

    The pseudo-Huber loss (Khrapov et al., arXiv 2403.16728) has the form
    2 delta^2 (sqrt(1 + (error / delta)^2) - 1). It tends to the squared error for large delta and to
    2 delta |error| for small delta.
    """
    squared = (prediction - target).square()
    if huber_delta is None:
        return squared
    # Rewritten by sqrt(1 + y) - 1 = y / (sqrt(1 + y) + 1), which keeps precision for small errors.
    return 2 * squared / ((1 + squared / huber_delta**2).sqrt() + 1)


@dataclass(frozen=True)
class NoisyLatents:
    """Noisy latents of N images, and what a prediction from them is compared with.

    Attributes:
        noisy, target: float32, N x C x ....
        timesteps: float32, N.
        weights: of the images' losses: float32, N.
        within: weights of the elements of an image: float32, N x 1 x ...; None: all weigh alike.
    """

    noisy: Tensor
    timesteps: Tensor
    target: Tensor
    weights: Tensor
    huber_delta: float | None
    within: Tensor | None = None

    def losses(self, prediction: Tensor) -> Tensor:
        """Return each image's loss, the weighted mean over its elements: float32, N."""
        error = pointwise_error(prediction.float(), self.target, self.huber_delta)
        dimensions = tuple(range(1, self.target.dim()))
        if self.within is None:
            return error.mean(dim=dimensions) * self.weights
        share = self.within.mean(dim=dimensions).clamp_min(SMALLEST_SHARE)
        return (error * self.within).mean(dim=dimensions) / share * self.weights


def add_noise(
    objective: Objective, latents: Tensor, draws: Draws, settings: LossSettings, mask: Tensor | None = None
) -> NoisyLatents:
    """Add noise to latents.

    Offset noise is one additional normal draw per channel (Guttenberg, "Diffusion with offset noise", 2023);
    it is part of the target too. Input perturbation is in the added noise but not in the target (Ning et al.,
    arXiv 2301.11706).

    Args:
        latents: float32, N x C x ....
        mask: float32, N x 1 x ...: the share of each latent that is to be learned; None: all.

    Raises:
        ValueError: the objective does not support the settings.
    """
    objective.check(settings)
    timesteps = objective.timesteps(density(draws.position, settings, objective.default_sampling))
    noise = draws.noise
    if settings.offset_noise:
        assert draws.offset is not None
        noise = noise + settings.offset_noise * draws.offset[(..., *[None] * (noise.dim() - 2))]
    added = noise
    if settings.input_perturbation:
        assert draws.perturbation is not None
        added = noise + settings.input_perturbation * draws.perturbation
    return NoisyLatents(
        objective.add_noise(latents, added, timesteps),
        timesteps,
        objective.target(latents, noise, timesteps),
        objective.weight(timesteps, settings),
        settings.huber_delta,
        None if mask is None else mask + settings.outside_mask * (1 - mask),
    )


def denoising_loss(
    denoise: Denoise,
    objective: Objective,
    latents: Tensor,
    draws: Draws,
    settings: LossSettings = LossSettings(),
    mask: Tensor | None = None,
) -> Tensor:
    """Add noise to latents, predict, square the error (Ho et al., arXiv 2006.11239, eq. 14).

    Args:
        denoise: function from (noisy latents, timesteps) to a prediction of the latents' shape.
        latents: float32, N x C x ....
        mask: as for `add_noise`.

    Returns:
        float32, N: each image's loss, the weighted mean over its elements.

    Raises:
        ValueError: the objective does not support the settings.
    """
    posed = add_noise(objective, latents, draws, settings, mask)
    return posed.losses(denoise(posed.noisy, posed.timesteps))
