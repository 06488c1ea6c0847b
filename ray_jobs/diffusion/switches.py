"""Checks of the serving options that a model's denoiser supports. Pure PyTorch."""

from ray_jobs.diffusion.families import Family
from ray_jobs.diffusion.protocols import Denoiser, Scheduler
from ray_jobs.diffusion.solvers import check_scheduler, scheduler_of


def check_serving(
    family: Family,
    denoiser: Denoiser,
    scheduler: Scheduler,
    *,
    solver: str,
    channels_last: bool,
    cache_features: bool,
) -> Scheduler:
    """Return the scheduler with which a model is served.

    Args:
        denoiser: its weights are not read.
        scheduler: the model's own.

    Raises:
        ValueError: an option, which is named, does not suit the model.
    """
    chosen = scheduler_of(scheduler, solver)
    check_scheduler(chosen)
    if channels_last:
        check_channels_last(family, denoiser)
    if cache_features:
        check_cache_features(family, denoiser)
    return chosen


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
