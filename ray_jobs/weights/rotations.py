"""The base with orthogonal matrices (OFT) merged into its layers, as a whole model."""

import copy
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ray_jobs.diffusion.pack import Trainable
from ray_jobs.diffusion.protocols import Scheduler
from ray_jobs.weights.merging import Merge, merge_layers
from ray_jobs.weights.schedulers import SCHEDULER


class Rotations:
    """Copies of the orthogonal matrices of a model, since those in training change meanwhile.

    Args:
        model: whose components have an adapter of peft's OFT.
    """

    def __init__(self, model: Trainable) -> None:
        # Component, layer and matrix, by the parameter's name.
        self.copies: dict[str, tuple[str, str, Any]] = {}
        for component, (prefix, part) in model.components.items():
            for layer, module in part.named_modules():
                if model.adapter in getattr(module, "oft_R", ()):
                    own = copy.deepcopy(module.oft_R[model.adapter]).float()
                    name = f"{prefix}.{layer}.oft_R.{model.adapter}.weight"
                    self.copies[name] = component, layer, own.requires_grad_(False)

    @torch.no_grad()
    def save(
        self,
        weights: Mapping[str, torch.Tensor],
        base: str,
        folder: Path,
        revision: str | None = None,
        scheduler: Scheduler | None = None,
    ) -> None:
        """Write a base with trained matrices merged into it as a whole pipeline, in the base's precision.

        Args:
            weights: the matrices' parameters by their name in the model.
            base: folder or hub name.
            folder: the new one.
            scheduler: replacement for the base's; None to keep that.
        """
        layers: dict[str, dict[str, Merge]] = {}
        for name, values in weights.items():
            component, layer, matrix = self.copies[name]
            matrix.weight.copy_(values)
            layers.setdefault(component, {})[layer] = partial(_turned, matrix)
        if scheduler is None:
            merge_layers(base, layers, folder, revision)
            return
        scheduler.save_pretrained(folder / SCHEDULER)
        merge_layers(base, layers, folder, revision, own_scheduler=True)


def _turned(matrix: Any, weight: torch.Tensor) -> torch.Tensor:
    """Return a layer's weight, out x in, whose inputs peft would multiply by the matrix."""
    return weight @ matrix.get_weight().T
