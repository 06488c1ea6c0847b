"""Adapters as peft's `save_pretrained` writes them: `adapter_model.safetensors` and `adapter_config.json`.

Layers have no component in their names, and scales are in the configuration alone. A file is of a text
encoder if its layers are CLIP's: of the only one that a family trains, or of the one that its folder is named
after.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ray_jobs.weights.adapter_files import CLIP_PREFIX, IN_FILE, adapter_scale, require_same_base, scaled
from ray_jobs.weights.lycoris import as_low_rank

PEFT_WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_BEGINNING = "base_model.model."
_CLIP_LAYER = re.compile(rf"({re.escape(CLIP_PREFIX)})?encoder\.layers\.\d+\.(self_attn|mlp)\.")
LYCORIS = ("LOHA", "LOKR")


def read_peft_format(file: Path, denoiser: str, encoders: Sequence[str]) -> dict[str, torch.Tensor] | None:
    """Return an adapter's tensors under diffusers' names, with its scales in them.

    None: the file has another name, or its tensors have.

    Args:
        denoiser: name of the component that it adapts, if its layers are not a text encoder's.
        encoders: names of the text encoders that can have one.

    Raises:
        SafetensorError: the file is damaged or has another format.
        ValueError: its configuration is missing, or says that it is no LoRA of the unchanged base; it is a
            LoHa or LoKr that is none; or which text encoder it is of is unknown.
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
        if not encoders or not all(_CLIP_LAYER.match(name) for name in converted):
            return {f"{denoiser}.{name}": tensor for name, tensor in converted.items()}
        prefix = f"{_encoder(file, encoders)}.{CLIP_PREFIX}"
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    return {f"{prefix}{name.removeprefix(CLIP_PREFIX)}": tensor for name, tensor in converted.items()}


def _encoder(file: Path, encoders: Sequence[str]) -> str:
    """Return the text encoder that a file is of."""
    if len(encoders) == 1 or file.parent.name in encoders:
        return file.parent.name if file.parent.name in encoders else encoders[0]
    raise ValueError(
        f"it is of a text encoder, of which the base has {len(encoders)}; name its folder after the one: "
        f"{' or '.join(encoders)}"
    )


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
