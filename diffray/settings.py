"""A few values of Python as the arguments of a stage, `--config` and `--set`."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.connect import one_line
from cluster.storage import STORES, Storage
from ray_jobs.config import Config, ConfigError, load_config, resolve_path
from ray_jobs.config.described import described
from ray_jobs.config.files import recipes
from ray_jobs.weights.model_files import model_folder
from ray_jobs.weights.model_index import INDEX, MODULAR_INDEX, model_index

PIPELINES = {
    "sd15-lora": "StableDiffusionPipeline",
    "sdxl-lora": "StableDiffusionXLPipeline",
    "sd3-full": "StableDiffusion3Pipeline",
    "flux-lora": "FluxPipeline",
    "kontext-lora": "FluxKontextPipeline",
}
"""Recipes for all bases of a family and a method, with the class of the bases' pipelines: a base on the hub
need not be asked."""


def stage_arguments(
    data: str | Path | Sequence[Mapping[str, Any]],
    *,
    base: str | None = None,
    method: str | None = None,
    epochs: float | None = None,
    recipe: str | None = None,
    name: str | None = None,
    fields: Mapping[str, Any],
) -> list[str]:
    """Return what `fit` stands for on a command line: `--config`, and a `--set` for each value given."""
    sources = None if isinstance(data, str | Path) else [dict(each) for each in data]
    given: dict[str, Any] = {
        "name": name,
        "model.base": base,
        "train.method": method,
        "train.epochs": epochs,
        "search.ladder": [] if epochs is not None else None,
    }
    settings = {field: value for field, value in given.items() if value is not None}
    settings |= {"data.source": str(data) if sources is None else None, "data.sources": sources or []}
    arguments = ["--config", recipe or recipe_for(base, method or "lora")]
    for override in overrides({**settings, **fields}):
        arguments += ["--set", override]
    return arguments


def recipe_for(base: str | None, method: str) -> str:
    """Return the recipe that is made for a base and method, or for another base of its family.

    Raises:
        ConfigError: there is none, so that the user must choose; names the nearest.
    """
    if base is None:
        raise ConfigError(f"recipe: give a base, or name the recipe: {', '.join(recipes())}, or a file")
    own = [each for each in PIPELINES if each.endswith(f"-{method}")]
    for each in (*own, "demo"):
        config = load_config(each)
        if (config.model.base, config.train.method) == (base, method):
            return each
    try:
        pipeline = why = _pipeline(base)
        if found := [each for each in own if PIPELINES[each] == pipeline]:
            return found[0]
        near = _nearest(pipeline, own)
    except (ValueError, OSError) as error:
        near, why = "", one_line(error)
    raise ConfigError(
        f"recipe: none is made for base={base!r} with method={method!r} ({why}); name the one to start from, "
        f"{near and f'as recipe={near!r}, '}of {', '.join(recipes())}, or a file"
    )


def _pipeline(base: str) -> str:
    """Return the class of a base's pipeline, from its index; of a hub name that is fetched.

    Raises:
        ValueError: the base has none; a ConfigError if its address cannot be read.
        OSError: the address is not reached.
    """
    if base.startswith(STORES):
        storage = Storage.open(base)
        for name in (INDEX, MODULAR_INDEX):
            if storage.exists(name):
                return str(storage.read_json(name).get("_class_name"))
        raise ValueError(f"{base}: it has no {INDEX}")
    return str(model_index(model_folder(resolve_path(base))).get("_class_name"))


def _nearest(pipeline: str, own: Sequence[str]) -> str:
    """Return the recipe that is most like what is asked for: of the family, or with such a denoiser.

    Args:
        own: recipes of the method, which is the other half of what is asked for.

    Raises:
        ValueError: the pipeline is of no known family.
    """
    from ray_jobs.diffusion.families import family_of

    kind = family_of(pipeline).denoiser

    def unlike(recipe: str) -> tuple[bool, bool, bool]:
        same = PIPELINES[recipe] == pipeline
        return not same, family_of(PIPELINES[recipe]).denoiser != kind, recipe not in own

    return min(PIPELINES, key=unlike)


def overrides(fields: Mapping[str, Any]) -> list[str]:
    """Return settings as `--set` takes them, one `section.field=value` each.

    Args:
        fields: values by dotted name, or mappings of a section's fields.
    """
    plain = {field.name for section in described() for field in section.fields}
    sections = {each.name for each in described()} - plain  # a range of `search.learning_rates` is one value
    found = []
    for name, value in fields.items():
        if isinstance(value, Mapping) and name in sections:
            found += overrides({f"{name}.{field}": each for field, each in value.items()})
        else:
            found.append(f"{name}={json.dumps(value, ensure_ascii=False, default=str)}")
    return found


def config_of(arguments: Sequence[str]) -> Config:
    """Return the configuration of a stage's arguments, `--config` and `--set`."""
    return load_config(arguments[1], list(arguments[3::2]))
