"""The adapter of `model.assistant`: frozen, active beside the one in training, and nowhere else.

A model that was distilled for a few steps loses that by plain training. A de-distillation adapter makes it
predict as before the distillation; what is trained meanwhile works without it too
(https://huggingface.co/ostris/zimage_turbo_training_adapter).
"""

import hashlib
import re
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from cluster.fetched import local_path
from ray_jobs.config import ModelConfig
from ray_jobs.diffusion.families import Family
from ray_jobs.diffusion.finetuning import ADAPTER
from ray_jobs.diffusion.protocols import Component, Settings
from ray_jobs.weights.adapter_files import read_adapter_file
from ray_jobs.weights.loading import LORA_WEIGHTS

ASSISTANT = "assistant"  # name of the adapter in peft
SCALING = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")
DORA = ("lora_magnitude_vector", "dora_scale")
NAMED = 3  # tensors without a place that an error names


def assistant_file(model: ModelConfig) -> Path:
    """Return the local file of `model.assistant`, downloading it first if it is not there.

    Raises:
        ValueError: there is no such file, or it is one of several.
    """
    name, revision = str(model.assistant), model.assistant_revision
    found = Path(local_path(name, "model.assistant"))
    if found.is_file():
        return found
    if found.is_dir():
        return found / _only(name, [path.name for path in found.iterdir()])
    import httpx2  # see model_files._files
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import HFValidationError

    repository, file = "/".join(name.split("/")[:2]), "/".join(name.split("/")[2:])
    try:
        file = file or _only(name, HfApi().list_repo_files(repository, revision=revision))
        return Path(hf_hub_download(repository, file, revision=revision))
    except (OSError, HFValidationError, httpx2.TransportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"model.assistant: {name}: neither a file, nor a folder, nor on the hub ({reason})"
        ) from None


def _only(name: str, files: list[str]) -> str:
    adapters = sorted(file for file in files if file.endswith(".safetensors"))
    if LORA_WEIGHTS in adapters:
        return LORA_WEIGHTS
    if len(adapters) != 1:
        which = f"has {', '.join(adapters)}; name one of them" if adapters else "has no .safetensors file"
        raise ValueError(f"model.assistant: {name}: {which}, as {name}/FILE.safetensors")
    return adapters[0]


def assistant_digest(model: ModelConfig) -> str | None:
    """Return the sha256 of the file of `model.assistant`; None without one."""
    if not model.assistant:
        return None
    with assistant_file(model).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def add_assistant(parts: Mapping[str, Component], family: Family, model: ModelConfig) -> None:
    """Add the adapter of `model.assistant`, frozen, to denoisers that have adapters in training.

    Each layer adds its output after that of the adapter in training, so that DoRA scales the base alone, as
    it will do without the assistant.

    Args:
        parts: denoisers by name.

    Raises:
        ValueError: the file is no LoRA, or not all of its tensors have a place in the denoisers.
    """
    file = assistant_file(model)
    tensors, settings = _read(file, family)
    misfits = [name for name, tensor in tensors.items() if not _has_place(name, tensor, tensors, parts)]
    if misfits or not tensors:
        named = ", ".join(misfits[:NAMED]) + (", ..." if len(misfits) > NAMED else "")
        raise ValueError(
            f"model.assistant: {file}: {len(misfits)} of {len(tensors)} tensors have no place in this base "
            f"({named}); give an adapter of this model"
        )
    for name, part in parts.items():
        prefix = f"{name}."
        own = {key.removeprefix(prefix): each for key, each in tensors.items() if key.startswith(prefix)}
        if own:
            scaling = {key.removeprefix(prefix): settings[key] for key in settings if key.startswith(prefix)}
            _inject(part, own, {key: scaling[key] for key in SCALING if key in scaling})


def _read(file: Path, family: Family) -> tuple[dict[str, torch.Tensor], Settings]:
    """Return an adapter's tensors by diffusers' name, `<component>.<layer>.lora_A.weight`, and its settings.

    Raises:
        ValueError: the file is no LoRA, or diffusers does not know its names.
    """
    import diffusers
    from safetensors import SafetensorError

    try:
        tensors, settings = read_adapter_file(file)
    except SafetensorError as error:
        raise ValueError(f"model.assistant: {file}: no safetensors file ({error})") from None
    except ValueError as error:
        raise ValueError(f"model.assistant: {error}") from None
    if scaled := next((name for name in tensors if any(mark in name for mark in DORA)), None):
        raise ValueError(
            f"model.assistant: {file}: {scaled} belongs to DoRA, but an assistant must be a LoRA"
        )
    if not family.has_lora_loader:
        return tensors, settings
    try:
        # Other programs' names become diffusers'; alphas are returned apart, or not at all.
        tensors, *alphas = getattr(diffusers, family.pipeline_class).lora_state_dict(
            str(file.parent), weight_name=file.name, return_alphas=True, return_lora_metadata=True
        )
    except Exception as error:  # of any kind: its converters expect the names that they know
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(
            f"model.assistant: {file}: diffusers cannot read it as an adapter of {family.pipeline_class} "
            f"({reason})"
        ) from None
    for name, alpha in (alphas[0] or {} if len(alphas) > 1 else {}).items():
        layer = name.removesuffix(".alpha")
        if (up := f"{layer}.lora_B.weight") in tensors:
            tensors[up] = tensors[up].float() * (float(alpha) / tensors[up].shape[1])
    return tensors, settings


def _has_place(
    name: str, tensor: torch.Tensor, others: Mapping[str, torch.Tensor], parts: Mapping[str, nn.Module]
) -> bool:
    """Return whether a tensor of an adapter is one of the two sides of a layer's update."""
    component, _, inside = name.partition(".")
    layer, _, side = inside.partition(".lora_")
    other = {"A.weight": "B.weight", "B.weight": "A.weight"}.get(side)
    try:
        module = parts[component].get_submodule(layer)
    except (KeyError, AttributeError):
        return False
    if f"{component}.{layer}.lora_{other}" not in others:
        return False
    kind = "channels" if isinstance(module, nn.Conv2d) else "features"
    end, size = ("in", tensor.shape[1]) if side == "A.weight" else ("out", tensor.shape[0])
    return bool(size == getattr(module, f"{end}_{kind}", None))


@torch.no_grad()
def _inject(part: Component, tensors: Mapping[str, torch.Tensor], settings: Settings) -> None:
    """Add an adapter, frozen and active.

    Args:
        tensors: by peft's name in the component.
        settings: peft's, of `SCALING`; without any the scale is 1.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    ranks = {key.partition(".lora_")[0]: len(each) for key, each in tensors.items() if ".lora_A." in key}
    if not settings:
        [(usual, _)] = Counter(ranks.values()).most_common(1)
        others = {f"^{re.escape(layer)}": rank for layer, rank in ranks.items() if rank != usual}
        settings = {"r": usual, "lora_alpha": usual, "rank_pattern": others, "alpha_pattern": others}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # that of the trained adapter
        inject_adapter_in_model(LoraConfig(**settings, target_modules=sorted(ranks)), part, ASSISTANT)
    for layer in part.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.set_adapter([ADAPTER, ASSISTANT])
    places = dict(part.named_parameters())
    for key, tensor in tensors.items():
        place = places[f"{key.removesuffix('.weight')}.{ASSISTANT}.weight"]
        place.requires_grad_(False).copy_(tensor)
