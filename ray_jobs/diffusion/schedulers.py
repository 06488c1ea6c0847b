"""The sampling scheduler of a trained model, where it differs from the base model's. Pure PyTorch."""

import inspect
from collections.abc import Mapping
from typing import Any

from ray_jobs.diffusion.protocols import Scheduler


def trained_scheduler(scheduler: Scheduler) -> Scheduler:
    """Return a scheduler for a model that was trained with `train.loss.zero_terminal_snr`.

    Its last timestep is pure noise, and sampling starts there (Lin et al., arXiv 2305.08891, sections 3.1 and
    3.3). It has the same class, or is DDIM if that class has no such option (diffusers 0.42: PNDM). Guidance
    is not rescaled (section 3.4), neither here nor in serving.

    Args:
        scheduler: diffusers scheduler over a noise schedule; it is not changed.
    """
    from diffusers import DDIMScheduler

    kind = type(scheduler)
    if "rescale_betas_zero_snr" not in inspect.signature(kind).parameters:
        kind = DDIMScheduler
    return rebuilt(scheduler, kind, rescale_betas_zero_snr=True, timestep_spacing="trailing")


def flow_shift(config: Mapping[str, Any]) -> float:
    """Return the shift of the noise levels that a diffusers scheduler's configuration for flow matching has.

    Raises:
        ValueError: the configuration is not for flow matching.
    """
    shift: float | None = config.get("shift")
    if shift is None and config.get("use_flow_sigmas"):  # solvers that are not for flows only
        shift = config["flow_shift"]
    if shift is None:
        raise ValueError("model.base: its scheduler has no shift; choose a flow-matching model")
    return shift


def rebuilt(scheduler: Scheduler, kind: Any, **options: Any) -> Scheduler:
    """Return a diffusers scheduler as one of class `kind`, with the given options changed.

    All other options keep their values, even those that its file omits and whose default differs in `kind`.
    """
    config = dict(scheduler.config)
    # Lists the options that the file omits, which `from_config` would set to the other class's defaults.
    config.pop("_use_default_values", None)
    if kind is not type(scheduler):
        # DDIM clips latents unless the configuration turns it off.
        config = {"clip_sample": False} | config
    return kind.from_config(config, **options)
