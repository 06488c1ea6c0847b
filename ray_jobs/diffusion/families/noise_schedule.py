"""Facet of a family: noise levels in training and sampling."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch

from ray_jobs.diffusion.objectives import Diffusion, FlowMatching, Objective
from ray_jobs.diffusion.protocols import Scheduler, Settings


class NoiseSchedule(ABC):
    """The training objective of a family, and the timesteps at which its pipeline samples."""

    @abstractmethod
    def objective(self, scheduler_config: Any, *, zero_terminal_snr: bool = False) -> Objective:
        """Return the denoiser's training objective.

        Raises:
            ValueError: the scheduler is of another family, or the family does not support the options.
        """

    @abstractmethod
    def set_timesteps(
        self, scheduler: Scheduler, num_steps: int, latent_shape: Sequence[int], device: str | torch.device
    ) -> None:
        """Prepare a scheduler for sampling, as the family's pipeline does.

        Args:
            latent_shape: (..., h, w).
        """

    @abstractmethod
    def first_step(self, num_steps: int, strength: float) -> int:
        """Return the number of steps that image-to-image skips, as in the family's own pipeline for it.

        Args:
            strength: in (0, 1], the share of the steps that are run.
        """


class VariancePreserving(NoiseSchedule):
    """A variance-preserving noise schedule (Ho et al., arXiv 2006.11239)."""

    def objective(self, scheduler_config: Any, *, zero_terminal_snr: bool = False) -> Objective:
        return Diffusion.from_scheduler(scheduler_config, zero_terminal_snr=zero_terminal_snr)

    def set_timesteps(
        self, scheduler: Scheduler, num_steps: int, latent_shape: Sequence[int], device: str | torch.device
    ) -> None:
        scheduler.set_timesteps(num_steps, device=device)
        _drop_negative_timestep(scheduler)

    def first_step(self, num_steps: int, strength: float) -> int:
        return num_steps - int(num_steps * strength)


class RectifiedFlow(NoiseSchedule):
    """A rectified flow (Esser et al., arXiv 2403.03206).

    Args:
        max_shift: default of dynamic shifting where the scheduler's configuration names none.
        patch: side of the denoiser's patches in latents, by which images are measured for dynamic shifting.
        even_sigmas: set sigmas in even steps from pure noise, as FLUX's pipeline does, instead of the
            scheduler's own.
    """

    def __init__(self, max_shift: float, *, patch: int = 2, even_sigmas: bool = False) -> None:
        self.max_shift, self.patch, self.even_sigmas = max_shift, patch, even_sigmas

    def objective(self, scheduler_config: Any, *, zero_terminal_snr: bool = False) -> Objective:
        if zero_terminal_snr:
            raise ValueError(
                "train.loss.zero_terminal_snr: the schedule of a flow-matching model already ends in "
                "pure noise; turn it off"
            )
        return FlowMatching.from_scheduler(scheduler_config)

    def dynamic_shift(
        self, config: Settings, latent_shape: Sequence[int], num_steps: int
    ) -> dict[str, float]:
        """Return `mu`, which gives larger images more of the noisy timesteps.

        It is linear in the number of patches, through two known points. Empty if the scheduler does not use
        dynamic shifting.
        """
        if not config.get("use_dynamic_shifting"):
            return {}
        few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        least, most = config.get("base_shift", 0.5), config.get("max_shift", self.max_shift)
        patches = (latent_shape[-2] // self.patch) * (latent_shape[-1] // self.patch)
        return {"mu": least + (most - least) * (patches - few) / (many - few)}

    def set_timesteps(
        self, scheduler: Scheduler, num_steps: int, latent_shape: Sequence[int], device: str | torch.device
    ) -> None:
        shift = self.dynamic_shift(scheduler.config, latent_shape, num_steps)
        # A scheduler with `use_flow_sigmas` spaces its sigmas itself.
        if self.even_sigmas and not scheduler.config.get("use_flow_sigmas"):
            sigmas = [1 - step / num_steps for step in range(num_steps)]
            scheduler.set_timesteps(sigmas=sigmas, device=device, **shift)
        else:
            scheduler.set_timesteps(num_steps, device=device, **shift)

    def first_step(self, num_steps: int, strength: float) -> int:
        return int(num_steps - num_steps * strength)


def _drop_negative_timestep(scheduler: Scheduler) -> None:
    """Remove the timestep -1 with which trailing spacing ends for some step counts, for example 61.

    In diffusers 0.42 the last value of `arange(1000, 0, -1000 / 61)` is 0 up to rounding. A step from there
    would multiply DDIM's latents by 14.65.
    """
    kept = int((scheduler.timesteps >= 0).sum())
    if kept == len(scheduler.timesteps):
        return
    scheduler.timesteps = scheduler.timesteps[:kept]
    if len(getattr(scheduler, "sigmas", ())) > kept + 1:
        scheduler.sigmas = torch.cat([scheduler.sigmas[:kept], scheduler.sigmas[-1:]])
