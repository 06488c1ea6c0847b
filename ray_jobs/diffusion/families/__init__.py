"""Model families that can be fine-tuned, by pipeline class: one per file in this folder, found by looking."""

import importlib
import pkgutil
from os.path import commonprefix

from ray_jobs.diffusion.families.family import Components, Conditions, Family
from ray_jobs.diffusion.families.text import Captions
from ray_jobs.diffusion.protocols import Pipeline

LETTERS = 4  # that pipelines of related families begin with, at least

__all__ = ["FAMILIES", "Captions", "Components", "Conditions", "Family", "family_of", "pipelines_with"]


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
CONTROLLED = {each.control.pipeline_class: each for each in FAMILIES.values() if each.control}
"""Families by their pipeline with a ControlNet."""


def pipelines_with(facet: str) -> str:
    """Return the pipelines of the families that have a facet, for errors.

    Args:
        facet: name of an attribute of `Family` that is None, False or 0 where it is missing.
    """
    return ", ".join(name for name, family in FAMILIES.items() if getattr(family, facet))


def family_of(pipeline: Pipeline | str) -> Family:
    """Return the family of a pipeline, given as an object or by the name of its class.

    Raises:
        ValueError: the pipeline belongs to no known family.
    """
    name = pipeline if isinstance(pipeline, str) else type(pipeline).__name__
    if name in CONTROLLED:
        if isinstance(pipeline, str):
            raise ValueError(
                f"model.base: {name} has a ControlNet in it; give a {CONTROLLED[name].pipeline_class}, and "
                "the folder of the ControlNet as model.controlnet"
            )
        return CONTROLLED[name]
    if name not in FAMILIES:
        shared = {known: len(commonprefix((name, known))) for known in FAMILIES}
        nearest = max(shared, key=lambda known: (shared[known], -len(known)))
        near = f" (the nearest is {nearest})" if shared[nearest] >= LETTERS else ""
        raise ValueError(
            f"model.base: {name} is not supported, only {', '.join(FAMILIES)}{near}; choose one of these, or "
            "add the family: docs/add-a-family.md"
        )
    return FAMILIES[name]
