"""Model families that can be fine-tuned, by pipeline class: one per file in this folder, found by looking."""

import importlib
import pkgutil

from ray_jobs.diffusion.families.family import Components, Conditions, Family
from ray_jobs.diffusion.families.text import Captions
from ray_jobs.diffusion.protocols import Pipeline

__all__ = ["FAMILIES", "Captions", "Components", "Conditions", "Family", "family_of"]


def _found() -> dict[str, Family]:
    for module in pkgutil.iter_modules(__path__, f"{__name__}."):
        importlib.import_module(module.name)
    kinds, families = [Family], {}
    while kinds:
        kind = kinds.pop()
        kinds += kind.__subclasses__()
        if hasattr(kind, "pipeline_class"):
            families[kind.pipeline_class] = kind()  # type: ignore[abstract]
    return dict(sorted(families.items()))


FAMILIES: dict[str, Family] = _found()


def family_of(pipeline: Pipeline | str) -> Family:
    """Return the family of a pipeline, given as an object or by the name of its class.

    Raises:
        ValueError: the pipeline belongs to no known family.
    """
    name = pipeline if isinstance(pipeline, str) else type(pipeline).__name__
    if name not in FAMILIES:
        raise ValueError(
            f"model.base: {name} is not supported, only {', '.join(FAMILIES)}; choose one of these"
        )
    return FAMILIES[name]
