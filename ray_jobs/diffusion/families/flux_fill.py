"""FLUX.1 Fill of Black Forest Labs: FLUX.1 that paints into a mask (https://github.com/black-forest-labs/flux)."""

import torch
from torch.nn.functional import pixel_unshuffle

from ray_jobs.diffusion.families.family import MASK_PIXELS, MASKED, Components, Conditions
from ray_jobs.diffusion.families.flux import Flux
from ray_jobs.diffusion.protocols import Pipeline


class FluxFill(Flux):
    """FLUX.1 Fill: the masked picture's patches and the mask's pixels are further channels of the image's."""

    pipeline_class = "FluxFillPipeline"
    paints_masks = True
    usual_guidance = 30.0
    native = (1024, 1024)
    variants = ("",)
    control = None
    control_channels = None
    further_channels = 4 + 8 * 8  # the masked picture's latents, and the pixels of a latent

    def is_distilled(self, pipeline: Pipeline) -> bool:
        return False

    def denoise(
        self, model: Components, latents: torch.Tensor, timesteps: torch.Tensor, conditions: Conditions
    ) -> torch.Tensor:
        mask = conditions[MASK_PIXELS].to(latents.dtype)
        mask = pixel_unshuffle(mask, mask.shape[-1] // latents.shape[-1])  # a latent's pixels as channels
        seen = torch.cat([latents, conditions[MASKED].to(latents.dtype), mask], dim=1)
        return super().denoise(model, seen, timesteps, conditions)
