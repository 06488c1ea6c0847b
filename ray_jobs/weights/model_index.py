"""The index in a model's folder: the class of its pipeline, and its components.

diffusers has two kinds: `model_index.json` of pipelines, and `modular_model_index.json` of modular ones,
whose components have a repository and a folder each. Both are read in the form of the first. This does not
import diffusers, which takes ten seconds; `modular` does.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

INDEX = "model_index.json"
MODULAR_INDEX = "modular_model_index.json"
BLOCKS = "_blocks_class_name"  # entry of a modular index: the class of its blocks
SAFETY_CHECKER = "safety_checker"
IMAGE_ENCODER = "image_encoder"  # for an IP-Adapter
UPSAMPLER = "prompt_upsampler"  # also the block that rewrites prompts with it, a language model
NEVER_LOADED = (SAFETY_CHECKER, IMAGE_ENCODER, UPSAMPLER, f"{UPSAMPLER}_processor")  # never written either

_REPOSITORY = "pretrained_model_name_or_path"


def index_path(folder: Path) -> Path | None:
    """Return the path of the index in a model's folder; None if there is none."""
    return next((folder / name for name in (INDEX, MODULAR_INDEX) if (folder / name).is_file()), None)


def model_index(folder: Path) -> dict[str, Any]:
    """Read a model's index: its class, its settings, and each component's library and class.

    A modular index also has `BLOCKS`, and no components that are never loaded.

    Args:
        folder: with an index.
    """
    path = index_path(folder)
    assert path is not None
    index: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if path.name == INDEX:
        return index
    return _settings(index) | {name: _entry(part) for name, part in _parts(index)}


def is_modular(index: Mapping[str, Any]) -> bool:
    """Return whether an index, from `model_index`, is of a modular pipeline."""
    return BLOCKS in index


def elsewhere(folder: Path) -> dict[str, str]:
    """Return the components of a modular model that its folder lacks, by name, and where they are.

    Empty for other models, whose components are always in their folders.
    """
    path = index_path(folder)
    if path is None or path.name == INDEX:
        return {}
    found = {}
    for name, (*_, place) in _parts(json.loads(path.read_text(encoding="utf-8"))):
        if not (folder / name).is_dir():
            found[name] = "/".join(filter(None, (place.get(_REPOSITORY), place.get("subfolder"))))
    return found


def write_index(base: Path, folder: Path, scheduler: str | None = None) -> None:
    """Write the index of a model that is made of a base's, all components in its own folder.

    diffusers reads a modular one with `load_components(pretrained_model_name_or_path=...)`, given the folder
    or the name that it has on the Hub, which its index cannot know.

    Args:
        base: the base's folder.
        scheduler: class of a scheduler that replaces the base's; None to keep that.
    """
    path = index_path(base)
    assert path is not None
    index: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if path.name == INDEX:
        index |= {name: [None, None] for name in NEVER_LOADED if name in index}
        if scheduler is not None:
            index["scheduler"] = ["diffusers", scheduler]
        if SAFETY_CHECKER in index:
            index["requires_safety_checker"] = False
    else:
        parts = {name: _entry(part) for name, part in _parts(index)}
        if scheduler is not None:
            parts["scheduler"] = ["diffusers", scheduler]
        index = _settings(index)
        for name, kind in parts.items():
            place = {_REPOSITORY: ".", "subfolder": name, "variant": None, "revision": None}
            index[name] = [*kind, {"type_hint": kind, **place}]
    (folder / path.name).write_text(json.dumps(index, indent=2), encoding="utf-8")


def _settings(index: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a modular index has beside components."""
    return {name: each for name, each in index.items() if not _is_part(each)}


def _is_part(entry: Any) -> bool:
    return isinstance(entry, list) and len(entry) == 3 and isinstance(entry[2], dict)


def _parts(index: Mapping[str, Any]) -> Iterator[tuple[str, list[Any]]]:
    """Yield the components of a modular index that are loaded: name, and library, class and place."""
    for name, entry in index.items():
        if _is_part(entry) and name not in NEVER_LOADED:
            yield name, entry


def _entry(part: list[Any]) -> list[Any]:
    """Return a component's library and class: those it was saved with, else those that its blocks expect."""
    library, kind, place = part
    return [library, kind] if library else list(place["type_hint"])
