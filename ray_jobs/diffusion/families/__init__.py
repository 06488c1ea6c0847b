"""Model families that can be fine-tuned, by pipeline class."""

from typing import Any

from ray_jobs.diffusion.families.family import Captions, Family
from ray_jobs.diffusion.families.flux import Flux
from ray_jobs.diffusion.families.stable_diffusion import StableDiffusion
from ray_jobs.diffusion.families.stable_diffusion_3 import StableDiffusion3
from ray_jobs.diffusion.families.stable_diffusion_xl import StableDiffusionXL

__all__ = ["FAMILIES", "Captions", "Family", "family_of"]

FAMILIES: dict[str, Family] = {
    family.pipeline_class: family
    for family in (StableDiffusion(), StableDiffusionXL(), StableDiffusion3(), Flux())
}


def family_of(pipeline: Any) -> Family:
    """Return the family of a pipeline, given as an object or by the name of its class.

    Raises:
        ValueError: the pipeline belongs to no known family.
    """
    name = pipeline if isinstance(pipeline, str) else type(pipeline).__name__
    if name not in FAMILIES:
        raise ValueError(
            f"model.base: {name} is none of {', '.join(FAMILIES)}; choose a model of one of these"
        )
    return FAMILIES[name]
