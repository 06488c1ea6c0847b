"""Adapters whose layers have a model's published names: those of kohya's programs, ComfyUI and ai-toolkit.

diffusers has converters for some families, some of them for the sizes of the published models alone. This
reads all that `Family.kohya_layer` and `Family.published_layer` write, whatever its size.
"""

import re
from collections.abc import Mapping

import torch
from torch import nn

from ray_jobs.diffusion.families import Family
from ray_jobs.weights.adapter_files import scaled
from ray_jobs.weights.dora import SCALE, magnitude

KOHYA, COMFYUI = "lora_unet_", "diffusion_model."
_ENDING = re.compile(r"\.(lora_down\.weight|lora_up\.weight|lora_A\.weight|lora_B\.weight|alpha|dora_scale)$")
_SIDES = {"lora_down.weight": "A", "lora_A.weight": "A", "lora_up.weight": "B", "lora_B.weight": "B"}
_CLIP_LAYER = re.compile(
    r"text_model_encoder_layers_(\d+)_(self_attn|mlp)_(q_proj|k_proj|v_proj|out_proj|fc1|fc2)"
)

Place = tuple[str, tuple[str, ...]]  # a component, and its layers that one layer of a file is made of


def from_published_names(
    family: Family, denoiser: nn.Module, stored: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor] | None:
    """Return an adapter's tensors under diffusers' names, with its alphas in them.

    None: some names are others than these, and diffusers may know them.

    Args:
        denoiser: of a model of the family; its weights may be without memory.
        stored: the file's tensors by name.

    Raises:
        ValueError: half of a layer is missing, or a layer has another size than its parts together.
    """
    if family.is_unet or not any(name.startswith((KOHYA, COMFYUI)) for name in stored):
        return None
    places = _places(family, denoiser)
    layers: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in stored.items():
        ending = _ENDING.search(name)
        if ending is None:
            return None
        target = name.removesuffix(ending[0])
        layers.setdefault(target, {})[_SIDES.get(ending[1], ending[1])] = tensor
        if target not in places and not _add_encoder(family, target, places):
            return None
    found: dict[str, torch.Tensor] = {}
    for target, own in layers.items():
        if missing := {"A", "B"} - own.keys():
            raise ValueError(f"{target}: its lora_{'down' if 'A' in missing else 'up'} is missing")
        component, parts = places[target]
        down = own["A"]
        up = scaled(own["B"], float(own.get("alpha", torch.tensor(float(len(down))))) / len(down))
        split = _rows(target, denoiser, parts, up)
        if SCALE in own:
            norms = magnitude(f"{target}.{SCALE}", own[SCALE], down, up)
            each = (norms,) if len(parts) == 1 else norms.split([len(rows) for rows in split])
            found |= {
                f"{component}.{part}.lora_magnitude_vector": one.clone()
                for part, one in zip(parts, each, strict=True)
            }
        for part, rows in zip(parts, split, strict=True):
            used = torch.ones(len(down), dtype=torch.bool)
            if len(parts) > 1 and SCALE not in own:
                used = rows.flatten(1).any(dim=0)
            if used.any():  # a part whose rows are all zero was not trained
                found[f"{component}.{part}.lora_A.weight"] = down[used].contiguous()
                found[f"{component}.{part}.lora_B.weight"] = rows[:, used].contiguous()
    return found


def _places(family: Family, denoiser: nn.Module) -> dict[str, Place]:
    """Return the places of all layers of the denoiser by their names in files."""
    found: dict[str, Place] = {}
    for layer, module in denoiser.named_modules():
        if not isinstance(module, nn.Linear | nn.Conv2d):
            continue
        found[f"{COMFYUI}{layer}"] = found[f"{KOHYA}{layer.replace('.', '_')}"] = family.denoiser, (layer,)
        if published := family.published_layer(layer, denoiser.config):  # type: ignore[arg-type]
            name, parts = published
            found[COMFYUI + name] = found[KOHYA + name.replace(".", "_")] = family.denoiser, parts
    return found


def _add_encoder(family: Family, target: str, places: dict[str, Place]) -> bool:
    """Add the place of a text encoder's layer by its name in kohya's files; return whether it is one."""
    for component in family.trainable_encoders:
        inside = _CLIP_LAYER.fullmatch(target.removeprefix(f"{family.kohya_encoder(component)}_"))
        if inside and target.startswith(family.kohya_encoder(component)):
            layer = f"text_model.encoder.layers.{inside[1]}.{inside[2]}.{inside[3]}"
            places[target] = component, (layer,)
            return True
    return False


def _rows(
    target: str, denoiser: nn.Module, parts: tuple[str, ...], up: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Split the rows of a layer among those that it is made of."""
    if len(parts) == 1:
        return (up,)
    sizes = [int(getattr(denoiser.get_submodule(part), "out_features")) for part in parts]  # noqa: B009
    if sum(sizes) != len(up):
        raise ValueError(f"{target}: it has {len(up)} rows, and the model's {', '.join(parts)} {sum(sizes)}")
    return up.split(sizes)
