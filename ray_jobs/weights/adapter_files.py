"""Files of LoRA adapters: how their tensors are called, and which files are no adapter of the base.

Names are those of peft in diffusers' format: `<component>.<layer>.lora_A.weight`.
"""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

# Starting points of peft 0.21.2 that subtract the adapter's first values from the base's own weights: added
# to the plain base, their effect is off by those values.
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Parts of the tensors' names in peft's other methods.
OTHER_METHODS = {
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "oft_": "OFT",
    "boft_": "BOFT",
    "hra_": "HRA",
    "ia3_": "IA3",
    "lora_E": "AdaLoRA",
    "vera_": "VeRA",
}
CLIP_PREFIX = "text_model."
_IN_MEMORY = re.compile(r"\.(lora_A|lora_B|lora_magnitude_vector)\.[^.]+\.weight$")
_IN_FILE = re.compile(r"\.(lora_A\.weight|lora_B\.weight|lora_magnitude_vector)$")


def check_adapter(file: Path, names: Iterable[str], metadata: Mapping[str, str]) -> dict[str, Any]:
    """The adapter's settings by component, `<component>.<setting>`, as peft has them; empty if it has none.

    Args:
        names: of the file's tensors.
        metadata: of the file's header.

    Raises:
        ValueError: it is no LoRA, or one whose base was changed.
    """
    for name in names:
        parts = name.split(".")[1:]
        for mark, method in OTHER_METHODS.items():
            if any(part.startswith(mark) for part in parts):
                raise ValueError(
                    f"{file}: {name} is of {method}, and only LoRA, rsLoRA and DoRA are read; train one of "
                    "these"
                )
    try:
        settings = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    except ValueError:
        raise ValueError(f"{file}: its metadata (lora_adapter_metadata) is no JSON; save it again") from None
    for key, value in settings.items():
        if key.endswith(".init_lora_weights") and str(value).startswith(CHANGES_BASE):
            raise ValueError(
                f"{file}: {key} is {value!r}, which changes the base's own weights, so it is no adapter of "
                "the base; convert it (peft: save_pretrained, path_initial_model_for_weight_conversion) or "
                "train with another start"
            )
    return dict(settings)


def layer_in_memory(part: nn.Module, name: str) -> str:
    """A name of a component's file as the component has it in memory.

    transformers dropped `text_model.` in `CLIPTextModel` (5.6); files have it (see `file_name`) or lack it.
    """
    return name if hasattr(part, "text_model") else name.removeprefix(CLIP_PREFIX)


def file_name(part: nn.Module, name: str) -> str:
    """A name as all releases of transformers and diffusers read it in a file; `layer_in_memory`'s inverse."""
    if type(part).__name__ != "CLIPTextModel" or name.startswith(CLIP_PREFIX):
        return name
    return CLIP_PREFIX + name


@torch.no_grad()
def place_tensors(parts: Mapping[str, nn.Module], tensors: Mapping[str, torch.Tensor]) -> tuple[int, int]:
    """Write an adapter's tensors into the parameters that its loading has made.

    Loaders of diffusers 0.42.1 and transformers 5.23 leave some where they began, without an error: the
    magnitudes of DoRA in text encoders.

    Args:
        parts: components by name.
        tensors: of the file, by name.

    Returns:
        How many found their parameter, and how many parameters there are. Of files in other programs' names
        the latter twice.
    """
    there: dict[str, torch.Tensor] = {}
    for component, part in parts.items():
        for name, parameter in part.named_parameters():
            if _IN_MEMORY.search(name):
                there[component + "." + _IN_MEMORY.sub(r".\1", name)] = parameter
    stored = {name: tensor for name, tensor in tensors.items() if not name.endswith("alpha")}
    if not all(_IN_FILE.search(name) and name.partition(".")[0] in parts for name in stored):
        return len(there), len(there)
    placed = 0
    for name, tensor in stored.items():
        component, _, layer = name.partition(".")
        layer = layer_in_memory(parts[component], layer).removesuffix(".weight")
        place = there.get(f"{component}.{layer}")
        if place is not None and place.shape == tensor.shape:
            place.copy_(tensor)
            placed += 1
    return placed, len(there)
