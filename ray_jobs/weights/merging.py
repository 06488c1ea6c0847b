"""Adapters merged into their base: the sum in float32, stored in the precision that the base's files have."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from math import sqrt
from pathlib import Path

import torch

from ray_jobs.weights.adapter_files import CLIP_PREFIX, LowRank, low_rank_layers, read_adapter_file
from ray_jobs.weights.loading import LORA_WEIGHTS
from ray_jobs.weights.model_files import UNUSED, check_weights, model_folder
from ray_jobs.weights.model_index import write_index
from ray_jobs.weights.saving import copy_parts
from ray_jobs.weights.schedulers import SCHEDULER, has_scheduler, scheduler_class


@dataclass
class Rounding:
    """What storing merged weights in the base's precision changed.

    Attributes:
        update: sum of the squares of the update.
        lost: sum of the squares of what rounding added or took away.
        dtypes: of the changed weights.
    """

    update: float = 0.0
    lost: float = 0.0
    dtypes: frozenset[torch.dtype] = frozenset()

    @property
    def share(self) -> float:
        """Norm of what rounding changed as a share of the update's norm."""
        return sqrt(self.lost / self.update) if self.update else 0.0


Merge = Callable[[torch.Tensor], torch.Tensor]
"""Returns a layer's weight, float32, with its update.

Raises:
    ValueError: the update is of another shape.
"""


@torch.no_grad()
def merge_adapter(base: str, weights: Path, folder: Path, revision: str | None = None) -> Rounding:
    """Write a whole pipeline, a base with an adapter merged into it, in diffusers' format.

    Args:
        base: folder or hub name.
        weights: contains the adapter in diffusers' format, and its scheduler if it has its own.
        folder: the new one; at most one weight file is in memory at a time.

    Raises:
        ValueError: the adapter does not fit the base, or their weights cannot be read.
    """
    tensors, settings = read_adapter_file(weights / LORA_WEIGHTS)
    layers: dict[str, dict[str, Merge]] = {}
    for (component, layer), own in low_rank_layers(tensors, settings).items():
        layers.setdefault(component, {})[layer] = partial(merged_weight, layer=own)
    own_scheduler = has_scheduler(weights)
    if own_scheduler:
        shutil.copytree(weights / SCHEDULER, folder / SCHEDULER)
    return merge_layers(base, layers, folder, revision, own_scheduler=own_scheduler)


@torch.no_grad()
def merge_layers(
    base: str,
    layers: Mapping[str, Mapping[str, Merge]],
    folder: Path,
    revision: str | None = None,
    *,
    own_scheduler: bool = False,
) -> Rounding:
    """Write a whole pipeline, a base with updates merged into its layers, in diffusers' format.

    Args:
        base: folder or hub name.
        layers: by component and name.
        folder: the new one; at most one weight file is in memory at a time.
        own_scheduler: the folder has a scheduler, in place of the base's.

    Raises:
        ValueError: an update does not fit the base, or its weights cannot be read.
    """
    check_weights(base, revision=revision)
    source = model_folder(base, revision=revision, without=UNUSED)
    for component in layers:
        if not (source / component).is_dir():
            raise ValueError(f"{base}: it has no {component}, which the adapter changes")
    copy_parts(source, folder, without=[SCHEDULER] if own_scheduler else [])
    write_index(source, folder, scheduler_class(folder) if own_scheduler else None)
    rounding = Rounding()
    for component, changed in layers.items():
        _merge_part(folder / component, changed, rounding)
    return rounding


def _merge_part(folder: Path, layers: Mapping[str, Merge], rounding: Rounding) -> None:
    """Add the updates of a component's layers to its files, one file after another."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    missing = {_without_clip(layer): layer for layer in layers}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        changed = False
        for name, stored in tensors.items():
            key, _, kind = name.rpartition(".")
            layer = missing.pop(_without_clip(key), None) if kind == "weight" else None
            if layer is not None:
                try:
                    tensors[name] = _merged(stored, layers[layer], rounding)
                except ValueError as error:
                    raise ValueError(f"{folder.name}.{layer}: {error}") from None
                changed = True
        if changed:
            aside = path.with_suffix(".new")  # the tensors of the old file are mapped, not read
            save_file(tensors, aside, metadata)
            aside.replace(path)
    if missing:
        raise ValueError(f"{folder.name}.{min(missing.values())}: the base has no such layer")


def _without_clip(layer: str) -> str:
    return layer.removeprefix(CLIP_PREFIX)


def _merged(stored: torch.Tensor, merge: Merge, rounding: Rounding) -> torch.Tensor:
    """Return a layer's weight with its update, in its own dtype; count what rounding changed."""
    weight = stored.float()
    wanted = merge(weight)
    result = wanted.to(stored.dtype)
    rounding.update += float((wanted - weight).double().square().sum())
    rounding.lost += float((result.float() - wanted).double().square().sum())
    rounding.dtypes |= {stored.dtype}
    return result


def merged_weight(weight: torch.Tensor, layer: LowRank) -> torch.Tensor:
    """Return a layer's weight with its update, as peft merges it.

    DoRA (Liu et al., arXiv 2402.09353, eq. 5) gives each row of the sum the norm that was trained.

    Args:
        weight: float32, out x in, or out x in x height x width.

    Raises:
        ValueError: the update is of another shape.
    """
    if (len(layer.up), *layer.down.shape[1:]) != weight.shape:
        sizes = f"{tuple(layer.up.shape)} x {tuple(layer.down.shape)}"
        raise ValueError(f"{sizes} does not fit the base's {tuple(weight.shape)}")
    update = layer.scale * (layer.up.float().flatten(1) @ layer.down.float().flatten(1))
    total = weight + update.view(weight.shape)
    if layer.magnitude is None:
        return total
    factor = layer.magnitude.float().flatten() / total.flatten(1).norm(dim=1)
    return total * factor.view(-1, *[1] * (weight.dim() - 1))
