"""Train a small AutoencoderKL from scratch (only a new base model needs one). Pure PyTorch."""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


def reconstruction_loss(reconstruction: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    """Return L1 on the pixels plus L1 on their horizontal and vertical differences, which keeps edges sharp.

    Args:
        reconstruction, pixels: float, N x 3 x H x W, in [-1, 1].
    """
    error = reconstruction - pixels
    across, down = error.diff(dim=3), error.diff(dim=2)
    return error.abs().mean() + across.abs().mean() + down.abs().mean()


def psnr(reconstruction: torch.Tensor, pixels: torch.Tensor) -> float:
    """Return the batch's mean peak signal-to-noise ratio in decibels, for pixels in [-1, 1]."""
    squared = (reconstruction.clamp(-1, 1) - pixels).square().mean(dim=(1, 2, 3))
    return float((10 * torch.log10(4 / squared.clamp_min(1e-10))).mean())


def train_autoencoder(
    autoencoder: "AutoencoderKL",
    images: torch.Tensor,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    kl_weight: float,
    seed: int,
) -> Iterator[tuple[int, float, float]]:
    """Train `autoencoder` in place; yield (step, loss, PSNR in dB on the batch) after every step.

    AdamW under bfloat16 autocast; the learning rate is warmed up over 100 steps while it decays to 0 over
    half a cosine. The loss is `reconstruction_loss` plus `kl_weight` times the mean KL divergence per
    latent element (Kingma & Welling, arXiv 1312.6114, appendix B).

    Args:
        images: uint8, N x 3 x H x W.
    """
    generator = torch.Generator().manual_seed(seed)
    device = next(autoencoder.parameters()).device
    optimizer = torch.optim.AdamW(autoencoder.parameters(), lr=learning_rate, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps)),
    )
    autoencoder.train()
    for step in range(1, steps + 1):
        rows = torch.randint(len(images), (batch_size,), generator=generator)
        pixels = images[rows].to(device).float() / 127.5 - 1
        if torch.rand((), generator=generator) < 0.5:
            pixels = pixels.flip(3)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            posterior = autoencoder.encode(pixels).latent_dist
            reconstruction = autoencoder.decode(posterior.sample()).sample
        reconstruction = reconstruction.float()
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        loss = reconstruction_loss(reconstruction, pixels) + kl_weight * divergence
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(autoencoder.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        yield step, loss.item(), psnr(reconstruction.detach(), pixels)
    autoencoder.eval()


@torch.no_grad()
def standardise_latents(autoencoder: "AutoencoderKL", images: torch.Tensor) -> None:
    """Give every latent channel mean 0 and variance 1 over `images` (uint8, N x 3 x H x W).

    A denoiser needs latents of this scale (Rombach et al., arXiv 2112.10752, appendix G, rescales all
    channels by one factor). The affine map of each channel is folded into the 1x1 convolutions on both
    sides of the bottleneck, so the decoded images stay the same and `scaling_factor` becomes 1.
    """
    device = next(autoencoder.parameters()).device
    means = torch.cat(
        [
            autoencoder.encode(chunk.to(device).float() / 127.5 - 1).latent_dist.mean
            for chunk in images.split(64)
        ]
    )
    center, spread = means.mean(dim=(0, 2, 3)), means.std(dim=(0, 2, 3))
    channels = len(center)
    inward, outward = autoencoder.quant_conv, autoencoder.post_quant_conv
    # outward first: it must see the latents as they were, z = spread * standardised + center.
    outward.bias += outward.weight[:, :, 0, 0] @ center
    outward.weight *= spread.reshape(1, -1, 1, 1)
    inward.bias[:channels] -= center
    inward.bias[:channels] /= spread
    inward.weight[:channels] /= spread.reshape(-1, 1, 1, 1)
    inward.bias[channels:] -= 2 * spread.log()  # the other half are log-variances
    autoencoder.register_to_config(scaling_factor=1.0)
