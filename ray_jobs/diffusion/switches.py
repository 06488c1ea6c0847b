"""Checks of the serving options that a model's denoiser supports. Pure PyTorch."""

from ray_jobs.diffusion.families import Family
from ray_jobs.diffusion.protocols import Denoiser


def check_channels_last(family: Family, denoiser: Denoiser) -> None:
    """Raise ValueError for a denoiser with hardly any convolutions."""
    if not family.is_unet:
        raise ValueError(f"channels_last: {type(denoiser).__name__} has almost no convolutions; turn it off")


def check_cache_features(family: Family, denoiser: Denoiser) -> None:
    """Raise ValueError for a denoiser without deep features that a step can reuse from the previous one."""
    if not family.is_unet or len(denoiser.up_blocks) < 2:
        raise ValueError(
            "cache_features: only a UNet with at least two levels has deep features; turn it off"
        )
