"""LoRA files in the form of kohya's programs (sd-scripts, musubi-tuner), from those in diffusers' format.

These name layers as a model's first publication does (`Family.kohya_layer`), with queries, keys and values
in one layer where it has them so. Each layer has an `alpha`; the scale is alpha / rank.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from ray_jobs.diffusion.families import Family, family_of
from ray_jobs.diffusion.protocols import Settings
from ray_jobs.weights.adapter_files import LowRank, low_rank_layers, read_adapter_file
from ray_jobs.weights.loading import LORA_WEIGHTS, empty_model, read_index

OTHERS = "take --format diffusers, comfyui or merged"


def kohya_file(base: str, folder: Path, revision: str | None = None) -> bytes:
    """Return an adapter as a file of kohya's programs.

    Args:
        base: folder or hub name of the adapter's base.
        folder: contains the adapter, in diffusers' format.

    Raises:
        ValueError: those programs do not know the model, or would compute something else.
    """
    from safetensors.torch import save

    source = folder / LORA_WEIGHTS
    tensors, settings = read_adapter_file(source)
    family = family_of(read_index(base, revision)["_class_name"])
    if family.kohya is None:
        raise ValueError(f"kohya's programs are not known to train {family.pipeline_class}; {OTHERS}")
    denoiser = getattr(empty_model(base, [family.denoiser], revision=revision), family.denoiser)
    try:
        converted = kohya_tensors(family, denoiser, tensors, settings)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    metadata = kohya_metadata(family, denoiser.config, converted)
    # Programs that list adapters know one by this: the digest of all that follows the header.
    content = save(converted, metadata)
    start = 8 + int.from_bytes(content[:8], "little")
    return save(converted, metadata | {"sshs_model_hash": hashlib.sha256(content[start:]).hexdigest()})


def kohya_tensors(
    family: Family, denoiser: nn.Module, tensors: Mapping[str, torch.Tensor], settings: Settings
) -> dict[str, torch.Tensor]:
    """Return an adapter's tensors under kohya's names.

    Args:
        denoiser: of the base; its weights may be without memory.
        tensors: of the adapter's file, by name.
        settings: of its metadata (`check_adapter`).

    Raises:
        ValueError: see `kohya_file`.
    """
    layers = low_rank_layers(tensors, settings)
    found: dict[str, tuple[str, tuple[str, ...]]] = {}
    for (component, layer), own in layers.items():
        if own.magnitude is not None:
            raise ValueError(
                "DoRA: sd-scripts leaves magnitudes out without a word; take --format diffusers or merged"
            )
        place = family.kohya_layer(component, layer, denoiser.config)  # type: ignore[arg-type]
        if place is None:
            raise ValueError(f"kohya's files have no place for {component}.{layer}; {OTHERS}")
        found[place[0]] = component, place[1]
    converted: dict[str, torch.Tensor] = {}
    for target, (component, parts) in found.items():
        if len(parts) == 1:
            own = layers[component, parts[0]]
            down, up, alpha = own.down, own.up, own.scale * len(own.down)
        else:
            down, up = _stacked(denoiser, parts, [layers.get((component, part)) for part in parts])
            alpha = float(len(down))
        converted |= {
            f"{target}.lora_down.weight": down.contiguous(),
            f"{target}.lora_up.weight": up.contiguous(),
            f"{target}.alpha": torch.tensor(alpha),
        }
    return converted


def _stacked(
    denoiser: nn.Module, parts: tuple[str, ...], layers: list[LowRank | None]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the factors of an update whose rows are those of several layers, one after another.

    Args:
        parts: the layers' names; those without an update get rows of zeros.
    """
    ups = []
    for part, layer in zip(parts, layers, strict=True):
        if layer is None:
            ups.append(torch.zeros(int(getattr(denoiser.get_submodule(part), "out_features")), 0))  # noqa: B009
        else:
            ups.append(layer.up if layer.scale == 1 else layer.up.float() * layer.scale)
    return torch.cat([layer.down for layer in layers if layer]), torch.block_diag(*ups)


def kohya_metadata(family: Family, denoiser: Settings, tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Return the metadata that kohya's programs need to load a file, and others to list it.

    Rank and alpha are those of the layer with the largest rank; each layer's own are its tensors'.
    """
    assert family.kohya is not None
    downs = {name: len(each) for name, each in tensors.items() if name.endswith(".lora_down.weight")}
    largest = max(sorted(downs), key=lambda name: downs[name])
    alpha = float(tensors[largest.replace(".lora_down.weight", ".alpha")])
    second = family.is_unet and denoiser.get("cross_attention_dim") == 1024  # Stable Diffusion 2
    version, architecture = family.kohya.version, family.kohya.architecture
    if second:
        version, architecture = "sd_v2", "stable-diffusion-v2-512"
    return {
        "ss_network_module": family.kohya.module,
        "ss_network_dim": str(downs[largest]),
        "ss_network_alpha": f"{alpha:g}",
        "ss_network_args": json.dumps({}),
        "ss_base_model_version": version,
        "ss_v2": str(second),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{architecture}/lora",
    }
