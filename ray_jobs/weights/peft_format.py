"""Adapters as peft's `save_pretrained` writes them: `adapter_model.safetensors` and `adapter_config.json`.

Layers have no component in their names, and scales are in the configuration alone.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ray_jobs.weights.adapter_files import IN_FILE, adapter_scale, require_same_base, scaled
from ray_jobs.weights.lycoris import as_low_rank

PEFT_WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_BEGINNING = "base_model.model."
LYCORIS = ("LOHA", "LOKR")


def read_peft_format(file: Path, component: str) -> dict[str, torch.Tensor] | None:
    """Return an adapter's tensors under diffusers' names, with its scales in them.

    None: the file has another name, or its tensors have.

    Args:
        component: the one that it adapts.

    Raises:
        SafetensorError: the file is damaged or has another format.
        ValueError: its configuration is missing, or says that it is no LoRA of the unchanged base; or it is a
            LoHa or LoKr that is none.
    """
    from safetensors import safe_open

    if file.name != PEFT_WEIGHTS:
        return None
    with safe_open(file, "pt") as opened:
        stored = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    if not all(name.startswith(_BEGINNING) for name in stored):
        return None
    tensors = {name.removeprefix(_BEGINNING): tensor for name, tensor in stored.items()}
    try:
        converted = _converted(tensors, _settings(file.with_name(PEFT_CONFIG)))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    return {f"{component}.{name}": tensor for name, tensor in converted.items()}


def _settings(file: Path) -> dict[str, Any]:
    """Return peft's configuration of an adapter for an unchanged base."""
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
    except OSError:
        raise ValueError(f"no {file.name} is beside it, which has its scale; give a folder of both") from None
    except ValueError:
        raise ValueError(f"{file.name} is not JSON; save the adapter again") from None
    if not isinstance(told, dict):
        raise ValueError(f"{file.name} holds no settings; save the adapter again")
    require_same_base(told)
    return told


def _converted(tensors: Mapping[str, torch.Tensor], told: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Return a LoRA with a scale of 1."""
    kind = str(told.get("peft_type"))
    if kind in LYCORIS:
        return from_lycoris(tensors, told)
    if kind != "LORA":
        read = ", ".join(["LORA", *LYCORIS])
        raise ValueError(f"{PEFT_CONFIG}: peft_type {kind}: only {read} are read; train one of them")
    settings = {f"own.{key}": value for key, value in told.items()}
    found = dict(tensors)
    for name, tensor in tensors.items():
        layer = IN_FILE.sub("", name)
        if layer == name:
            raise ValueError(f"{_BEGINNING}{name}: no part of a LoRA; train without biases and whole layers")
        if name.endswith(".lora_B.weight"):
            scale = adapter_scale(PEFT_CONFIG, settings, ("own", layer), rank=tensor.shape[1])
            found[name] = scaled(tensor, scale)
    return found


def from_lycoris(tensors: Mapping[str, torch.Tensor], told: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Return LoHa or LoKr of peft's names as LoRA of scale 1; see `as_low_rank`.

    Args:
        told: peft's configuration.
    """
    from peft.utils.other import get_pattern_key

    alphas = told.get("alpha_pattern") or {}
    with_alphas = dict(tensors)
    for layer in {name.rpartition(".")[0] for name in tensors}:
        alpha = alphas.get(get_pattern_key(alphas.keys(), layer), told.get("alpha", 8))  # peft's default
        with_alphas[f"{layer}.alpha"] = torch.tensor(float(alpha))
    low_rank = as_low_rank(with_alphas, any_layer=True)
    found = {}
    for name, tensor in low_rank.items():
        if name.endswith(".lora_up.weight"):
            layer = name.removesuffix(".lora_up.weight")
            down = low_rank[f"{layer}.lora_down.weight"]
            found[f"{layer}.lora_A.weight"] = down
            found[f"{layer}.lora_B.weight"] = scaled(tensor, float(low_rank[f"{layer}.alpha"]) / len(down))
    return found
