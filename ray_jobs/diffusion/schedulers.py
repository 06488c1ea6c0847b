"""The scheduler that draws what was trained, where that is not the base model's own. Pure PyTorch."""

import inspect
from typing import Any


def trained_scheduler(scheduler: Any) -> Any:
    """A scheduler whose last timestep is pure noise and which begins there, as a model was trained with
    `train.loss.zero_terminal_snr` (Lin et al., arXiv 2305.08891, sections 3.1 and 3.3).

    It is of the same class, or DDIM where that class cannot (diffusers 0.42: PNDM). Guidance is not rescaled
    (section 3.4), neither here nor when pictures are served.

    Args:
        scheduler: of diffusers, over a noise schedule; it stays as it is.
    """
    from diffusers import DDIMScheduler

    kind = type(scheduler)
    if "rescale_betas_zero_snr" not in inspect.signature(kind).parameters:
        kind = DDIMScheduler
    return rebuilt(scheduler, kind, rescale_betas_zero_snr=True, timestep_spacing="trailing")


def rebuilt(scheduler: Any, kind: Any, **options: Any) -> Any:
    """A scheduler of diffusers as one of class `kind`, with some options changed; all else stays, also what
    its file leaves out and the other class has another default for."""
    config = dict(scheduler.config)
    # Names what the file left out, which `from_config` would replace by the other class's defaults.
    config.pop("_use_default_values", None)
    if kind is not type(scheduler):
        # DDIM clips latents where a configuration does not say that it must not.
        config = {"clip_sample": False} | config
    return kind.from_config(config, **options)
