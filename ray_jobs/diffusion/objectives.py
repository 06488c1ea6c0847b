"""What a denoiser is trained to predict, and how far off it is. Pure functions of tensors."""

from collections.abc import Callable
from typing import Any

import torch

Denoise = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def alphas_cumprod(scheduler_config: dict[str, Any]) -> torch.Tensor:
    """The noise schedule (alpha-bar of Ho et al., arXiv 2006.11239) of a scheduler's configuration.

    Returns:
        float32, one a training timestep: the share of the signal's variance that is left.
    """
    from diffusers import DDPMScheduler

    return DDPMScheduler.from_config(scheduler_config).alphas_cumprod


def sample_posterior(
    mean: torch.Tensor, logvar: torch.Tensor, autoencoder: Any, generator: torch.Generator
) -> torch.Tensor:
    """Draw latents from the autoencoder's posterior (Kingma & Welling, arXiv 1312.6114, section 2.4), scaled
    as the denoiser takes them (Rombach et al., arXiv 2112.10752, appendix G).

    Args:
        mean, logvar: float32, N x C x H x W.
        autoencoder: its configuration, with `scaling_factor` and perhaps `shift_factor`.
    """
    drawn = mean + (0.5 * logvar).exp() * torch.randn(mean.shape, generator=generator)
    return (drawn - (autoencoder.get("shift_factor") or 0.0)) * autoencoder["scaling_factor"]


def add_noise(latents: torch.Tensor, noise: torch.Tensor, signal_variance: torch.Tensor) -> torch.Tensor:
    """x_t = sqrt(alpha-bar) x_0 + sqrt(1 - alpha-bar) noise (arXiv 2006.11239, eq. 4).

    Args:
        latents, noise: N x C x H x W.
        signal_variance: alpha-bar at each picture's timestep, N.
    """
    variance = signal_variance.reshape(-1, 1, 1, 1)
    return variance.sqrt() * latents + (1 - variance).sqrt() * noise


def prediction_target(
    prediction_type: str,
    latents: torch.Tensor,
    noise: torch.Tensor,
    signal_variance: torch.Tensor,
) -> torch.Tensor:
    """What the denoiser should return: the noise (`epsilon`), x_0 (`sample`), or the velocity
    sqrt(alpha-bar) noise - sqrt(1 - alpha-bar) x_0 (`v_prediction`; Salimans & Ho, arXiv 2202.00512).

    Raises:
        ValueError: for another prediction type.
    """
    variance = signal_variance.reshape(-1, 1, 1, 1)
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "sample":
        return latents
    if prediction_type == "v_prediction":
        return variance.sqrt() * noise - (1 - variance).sqrt() * latents
    raise ValueError(
        f"prediction_type {prediction_type!r} of the model's scheduler is not one of "
        "epsilon, sample, v_prediction"
    )


def min_snr_weight(prediction_type: str, signal_variance: torch.Tensor, gamma: float) -> torch.Tensor:
    """min(SNR, gamma) as a weight on x_0's error, turned into one on the prediction's error
    (Hang et al., arXiv 2303.09556, section 3.4).

    Args:
        signal_variance: alpha-bar, N.

    Returns:
        N weights: divided by SNR for epsilon, by SNR + 1 for velocity.
    """
    snr = signal_variance / (1 - signal_variance)
    divisor = {"epsilon": snr, "sample": torch.ones_like(snr), "v_prediction": snr + 1}
    return snr.clamp(max=gamma) / divisor[prediction_type]


def denoising_loss(
    denoise: Denoise,
    latents: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    schedule: torch.Tensor,
    *,
    prediction_type: str,
    min_snr_gamma: float | None = None,
) -> torch.Tensor:
    """Draw noise onto latents, predict, square the error (arXiv 2006.11239, eq. 14).

    Args:
        denoise: (noisy latents, timesteps) to a prediction of the latents' shape.
        latents, noise: float, N x C x H x W.
        timesteps: int64, N, indices into the schedule.
        schedule: alpha-bar, from `alphas_cumprod`.

    Returns:
        The mean over the batch, a float32 scalar.
    """
    variance = schedule[timesteps]
    noisy = add_noise(latents, noise, variance)
    target = prediction_target(prediction_type, latents, noise, variance)
    error = (denoise(noisy, timesteps).float() - target).square().mean(dim=(1, 2, 3))
    if min_snr_gamma is not None:
        error = error * min_snr_weight(prediction_type, variance, min_snr_gamma)
    return error.mean()
