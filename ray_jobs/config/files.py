"""Configuration files: YAML, each of which may lay its settings over those of another one."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from ray_jobs.config.fields import ConfigError, nearest, resolve_path
from ray_jobs.config.yaml_text import read_yaml

Tree = dict[str, Any]  # settings by field, and sections of them

EXTENDS = "extends"
"""Key of the file whose settings a file starts from, relative to its own folder; or of a recipe."""

RECIPES = Path(__file__).resolve().parents[2] / "configs"
"""Folder of the configurations that come with diffray, in a checkout and where its wheel is installed."""


def recipes() -> list[str]:
    """Return the names of all recipes."""
    return sorted(each.stem for each in RECIPES.glob("*.yaml"))


def config_file(given: str, folder: Path | None = None) -> Path:
    """Return the file that a user named: a recipe by a bare name, as `sdxl-lora`, else a path.

    A name without a dot or slash is never a path, so that it means the same in every folder.

    Args:
        folder: what relative paths start from; default: `home()`.

    Raises:
        ConfigError: no recipe has that name; names the nearest.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-]+", given):
        return Path(resolve_path(given)) if folder is None else folder / given
    if given not in recipes():
        fix = nearest(given, recipes(), f"there are {', '.join(recipes())};")
        raise ConfigError(f"{given}: no such recipe; {fix} a file is named with its ending, as {given}.yaml")
    return RECIPES / f"{given}.yaml"


def read_settings(path: Path, overrides: Iterable[str]) -> Tree:
    """Return the settings of a file, and of all that it extends, with `section.field=value` laid over them.

    Raises:
        ConfigError: naming the file or the override, and the fix.
    """
    tree: Tree = {}
    for _, settings in reversed(_layers(path)):
        tree = _merged(tree, settings)
    for override in overrides:
        _set(tree, override)
    return tree


def files_of(path: Path) -> list[Path]:
    """Return a file that `read_settings` reads, and those that it extends."""
    return [file for file, _ in _layers(path)]


def _layers(path: Path, extended_by: tuple[Path, ...] = ()) -> list[tuple[Path, Tree]]:
    """Return a YAML file with its own settings, then the files that it extends with theirs.

    Args:
        path: a relative `extends` starts from its folder.
        extended_by: files that extend this one, the outermost first.
    """
    where = f"{extended_by[-1]}: {EXTENDS}: {path}" if extended_by else str(path)
    if path.resolve() in [each.resolve() for each in extended_by]:
        raise ConfigError(f"{where}: the files extend each other in a circle; remove one `{EXTENDS}`")
    try:
        tree = read_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        fix = "correct the path" if extended_by else "give --config one of configs/*.yaml"
        raise ConfigError(f"{where}: no such file; {fix}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{where}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{where}: not a configuration: it must be a mapping of sections, such as `train:`")
    base = tree.pop(EXTENDS, None)
    if base is None:
        return [(path, tree)]
    if not isinstance(base, str):
        raise ConfigError(f"{where}: {EXTENDS}: {base!r} is not a path; name one configuration file")
    try:
        extended = config_file(base, path.parent)
    except ConfigError as error:
        raise ConfigError(f"{path}: {EXTENDS}: {error}") from None
    return [(path, tree), *_layers(extended, (*extended_by, path))]


def _merged(base: Tree, over: Tree) -> Tree:
    """Return both mappings, section by section; any other value of `over` replaces that of `base`."""
    both = {
        name: _merged(base[name], value)
        for name, value in over.items()
        if isinstance(value, dict) and isinstance(base.get(name), dict)
    }
    return base | over | both


def _set(tree: Tree, override: str) -> None:
    """Put `a.b=value` into `tree`; the value is read as YAML."""
    dotted, equals, value = override.partition("=")
    if not equals:
        raise ConfigError(f"--set {override}: write it as section.field=value")
    *sections, field = dotted.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"--set {override}: {section} is a value, not a section")
    try:
        tree[field] = read_yaml(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override}: not YAML: {' '.join(str(error).split())}") from None
