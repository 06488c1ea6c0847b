"""A few values of Python as the arguments of a stage, `--config` and `--set`."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ray_jobs.config import Config, ConfigError, load_config
from ray_jobs.config.described import described
from ray_jobs.config.files import recipes


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
    """Return the recipe that is made for a base and method.

    Raises:
        ConfigError: there is none, so that the user must choose.
    """
    own = [each for each in recipes() if each.endswith(f"-{method}")]
    if found := [each for each in own if load_config(each).model.base == base]:
        return found[0]
    raise ConfigError(
        f"recipe: none is made for base={base!r} with method={method!r}; name the one to start from, of "
        f"{', '.join(recipes())}, or a file"
    )


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
