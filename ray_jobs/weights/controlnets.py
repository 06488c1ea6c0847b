"""Read and write ControlNets in diffusers' format, each as a folder of its own beside no base."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ray_jobs.diffusion.families import family_of
from ray_jobs.diffusion.families.control import CONTROLNET, Control
from ray_jobs.diffusion.protocols import Component, Denoiser, Pipeline, Scheduler
from ray_jobs.metrics.vision_model import FILES, downloaded, model_digest
from ray_jobs.weights.schedulers import SCHEDULER

if TYPE_CHECKING:
    from ray_jobs.config import ModelConfig

FIELD = "model.controlnet"
CONFIGURATION = "config.json"


def controlnet_folder(folder: str | Path) -> Path | None:
    """Return the folder of a ControlNet in the weights that a training has made; None if there is none."""
    found = Path(folder) / CONTROLNET
    return found if (found / CONFIGURATION).is_file() else None


def given_folder(model: "ModelConfig") -> Path:
    """Return the local folder of `model.controlnet`, fetched if it is not local.

    Raises:
        ValueError: it is no ControlNet in diffusers' format with safetensors weights.
    """
    from cluster.fetched import local_path

    place = local_path(str(model.controlnet), FIELD)
    found = controlnet_folder(place) or Path(place)
    if not found.is_dir():
        found = downloaded(place, model.controlnet_revision, FIELD, FILES)
    if not (found / CONFIGURATION).is_file() or not any(found.glob("*.safetensors")):
        raise ValueError(
            f"{FIELD}: {model.controlnet}: a folder with {CONFIGURATION} and safetensors is needed, as "
            "diffusers' save_pretrained writes it"
        )
    return found


def given_digest(model: "ModelConfig") -> str | None:
    """Return the digest of the files of `model.controlnet`; None without one."""
    return model_digest(given_folder(model)) if model.controlnet else None


def read_controlnet(
    folder: Path,
    control: Control,
    denoiser: Denoiser,
    *,
    dtype: torch.dtype = torch.float32,
    empty: bool = False,
) -> Component:
    """Read a ControlNet, frozen and in evaluation mode.

    Args:
        folder: with its configuration and weights.
        denoiser: of the base that it is to steer.
        empty: on the meta device: no weights are read.

    Raises:
        ValueError: it is one of another family or another size of model, or has a switch that is not
            supported.
    """
    import diffusers
    from accelerate import init_empty_weights

    settings = json.loads((folder / CONFIGURATION).read_text(encoding="utf-8"))
    if (name := settings.get("_class_name")) != control.network_class:
        raise ValueError(f"{folder}: a {name}, where the base needs a {control.network_class}")
    kind: Any = getattr(diffusers, control.network_class)
    if empty:
        with init_empty_weights():
            network = kind.from_config(settings)
    else:
        network = kind.from_pretrained(str(folder), dtype=dtype, use_safetensors=True)
    try:
        control.check(network)
        _require_sizes(network, denoiser)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    found: Component = network.requires_grad_(False).eval()
    return found


def _require_sizes(network: Component, denoiser: Denoiser) -> None:
    """Raise ValueError if a layer of a ControlNet has another size than the denoiser's of its name."""
    theirs = dict(denoiser.named_parameters())
    for name, own in network.named_parameters():
        other = theirs.get(name)
        if other is not None and other.shape != own.shape:
            raise ValueError(
                f"{name} is {tuple(own.shape)} there and {tuple(other.shape)} in the base; it was trained "
                "for another base"
            )


def controlled(pipeline: Pipeline, folder: Path, *, dtype: torch.dtype = torch.float32) -> Pipeline:
    """Return diffusers' pipeline of a base and the ControlNet in a folder; it shares the base's components.

    Args:
        folder: with the ControlNet's configuration and weights.

    Raises:
        ValueError: the base's family has no ControlNets here, or as for `read_controlnet`.
    """
    family = family_of(pipeline)
    if family.control is None:
        raise ValueError(f"{folder}: {family.pipeline_class} has no ControlNets here")
    network = read_controlnet(folder, family.control, getattr(pipeline, family.denoiser), dtype=dtype)
    return family.control.pipeline(pipeline, network)


@torch.no_grad()
def save_controlnet(
    network: Component,
    prefix: str,
    weights: Mapping[str, torch.Tensor],
    folder: Path,
    scheduler: Scheduler | None = None,
) -> None:
    """Write a ControlNet with trained weights in diffusers' format, as safetensors.

    Args:
        network: a copy, not the one in training: its weights are overwritten.
        prefix: of its parameters' names in `weights`.
        scheduler: replacement for the base's, written beside it; None to keep that.
    """
    own = {f"{prefix}.{key}": parameter for key, parameter in network.named_parameters()}
    for key, value in weights.items():
        own[key].copy_(value)
    network.save_pretrained(folder / CONTROLNET, safe_serialization=True)
    if scheduler is not None:
        scheduler.save_pretrained(folder / SCHEDULER)
