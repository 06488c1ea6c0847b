"""LoRA adapter files: names of their tensors, and rejection of files that are not adapters of the base.

Names are those of peft in diffusers' format: `<component>.<layer>.lora_A.weight`.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from math import frexp, sqrt
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ray_jobs.diffusion.protocols import Settings
from ray_jobs.weights.lycoris import as_low_rank

# Initialisations of peft 0.21.2 that subtract the adapter's initial values from the base's weights: added to
# the plain base, such an adapter is off by those values.
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Prefixes in tensor names that identify peft's other methods.
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
# Fields of peft's configuration that switch on variants with different arithmetic.
OTHER_VARIANTS = (
    "arrow_config",
    "alora_invocation_tokens",
    "kasa_config",
    "layer_replication",
    "monteclora_config",
    "use_bdlora",
    "use_qalora",
    "velora_config",
)
CLIP_PREFIX = "text_model."
_IN_MEMORY = re.compile(r"\.(lora_A|lora_B|lora_magnitude_vector)\.[^.]+\.weight$")
IN_FILE = re.compile(r"\.(lora_A\.weight|lora_B\.weight|lora_magnitude_vector)$")


def read_adapter_file(file: Path) -> tuple[dict[str, torch.Tensor], Settings]:
    """Return an adapter file's tensors by name, and its peft settings as `check_adapter` does.

    LoHa and LoKr of LyCORIS are returned as the LoRA that they are.

    Raises:
        SafetensorError: the file is damaged or has another format.
        ValueError: see `check_adapter` and `as_low_rank`.
    """
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        metadata = opened.metadata() or {}
    try:
        tensors = as_low_rank(tensors)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    return tensors, check_adapter(file, tensors, metadata)


def check_adapter(file: Path, names: Iterable[str], metadata: Mapping[str, str]) -> Settings:
    """Check an adapter file and return its peft settings by `<component>.<setting>`; empty if it has none.

    Args:
        names: names of the file's tensors.
        metadata: metadata in the file's header.

    Raises:
        ValueError: the file is not a LoRA, its metadata is no JSON, or its initialisation changed the base.
    """
    for name in names:
        parts = name.split(".")[1:]
        for mark, method in OTHER_METHODS.items():
            if any(part.startswith(mark) for part in parts):
                raise ValueError(
                    f"{file}: {name} belongs to {method}, but only LoRA, rsLoRA and DoRA are supported, and "
                    "LoHa and LoKr by LyCORIS' names; train one of these"
                )
    try:
        settings = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    except ValueError:
        raise ValueError(f"{file}: its metadata (lora_adapter_metadata) is not JSON; save it again") from None
    try:
        require_same_base(settings)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    return dict(settings)


def require_same_base(settings: Settings) -> None:
    """Raise ValueError if peft's initialisation of an adapter changed its base.

    Args:
        settings: by `<component>.<setting>`, or by peft's names.
    """
    for key, value in settings.items():
        if key.rpartition(".")[2] == "init_lora_weights" and str(value).startswith(CHANGES_BASE):
            raise ValueError(
                f"{key} is {value!r}, which changes the base's own weights, so it does not fit "
                "the unchanged base; convert it (peft: save_pretrained, "
                "path_initial_model_for_weight_conversion) or train with another initialisation"
            )


class LowRank(NamedTuple):
    """A layer's part of an adapter: its update is `scale * up @ down`.

    Attributes:
        down: rank x in, or rank x in x height x width of a convolution.
        up: out x rank, or out x rank x 1 x 1.
        magnitude: DoRA's norms of the rows of base and update together, of `out` numbers; else None.
    """

    down: torch.Tensor
    up: torch.Tensor
    scale: float
    magnitude: torch.Tensor | None


def low_rank_layers(
    tensors: Mapping[str, torch.Tensor], settings: Settings
) -> dict[tuple[str, str], LowRank]:
    """Return an adapter's layers by component and layer, sorted.

    Args:
        tensors: of the adapter's file, by name.
        settings: of its metadata (`check_adapter`).

    Raises:
        ValueError: a tensor is not one of peft's LoRA, or lacks its other half.
    """
    for name in tensors:
        if not IN_FILE.search(name):
            raise ValueError(
                f"{name} is not a name of peft's; load the file with diffusers and save it again"
            )
    found = {}
    for place in sorted({tuple(IN_FILE.sub("", name).split(".", 1)) for name in tensors}):
        component, layer = place
        names = {part: f"{component}.{layer}.lora_{part}.weight" for part in "AB"}
        if missing := [name for name in names.values() if name not in tensors]:
            raise ValueError(f"{missing[0]} is missing; save the adapter again")
        down, up = (tensors[name] for name in names.values())
        scale = adapter_scale(names["A"], settings, (component, layer), rank=len(down))
        magnitude = tensors.get(f"{component}.{layer}.lora_magnitude_vector")
        found[component, layer] = LowRank(down, up, scale, magnitude)
    return found


def tensors_of(layers: Mapping[tuple[str, str], LowRank]) -> dict[str, torch.Tensor]:
    """Return the tensors of layers whose scale is 1; inverse of `low_rank_layers` without settings."""
    assert all(own.scale == 1 and own.magnitude is None for own in layers.values())
    return {
        f"{component}.{layer}.lora_{side}.weight": tensor
        for (component, layer), own in layers.items()
        for side, tensor in (("A", own.down), ("B", own.up))
    }


def adapter_scale(where: str, settings: Mapping[str, Any], place: tuple[str, str], *, rank: int) -> float:
    """Return alpha / rank of a layer as peft computes it (alpha / sqrt(rank) for rsLoRA).

    1, as in diffusers, if the file has no configuration.

    Args:
        where: beginning of errors.
        settings: the file's (`check_adapter`).
        place: component and layer.

    Raises:
        ValueError: the adapter is a variant that is computed otherwise.
    """
    from peft.utils.other import get_pattern_key

    part, layer = place
    own = {
        key.removeprefix(f"{part}."): value for key, value in settings.items() if key.startswith(f"{part}.")
    }
    if not own:
        return 1.0
    for option in OTHER_VARIANTS:
        if own.get(option):
            raise ValueError(f"{where}: {option}={own[option]!r} is not supported; train it without")
    alphas = own.get("alpha_pattern") or {}
    alpha = alphas.get(get_pattern_key(alphas.keys(), layer), own.get("lora_alpha", 8))  # peft's default
    return float(alpha) / (sqrt(rank) if own.get("use_rslora") else rank)


def scaled(up: torch.Tensor, scale: float) -> torch.Tensor:
    """Return an up projection times a scale: in its own dtype where that loses nothing, else in float32.

    Most scales are powers of two. With them bf16 loses nothing, and fp16 last bits of its smallest numbers.
    """
    if scale == 1:
        return up
    if frexp(scale)[0] == 0.5:  # a power of two
        result = up * scale
        if torch.equal(result / scale, up):
            return result
    return up.float() * scale


def unscaled(ranks: Mapping[str, int]) -> dict[str, Any]:
    """Return peft's settings of an adapter without any: the scale is 1.

    Args:
        ranks: of its layers, by name.
    """
    [(usual, _)] = Counter(ranks.values()).most_common(1)
    others = {f"^{re.escape(layer)}": rank for layer, rank in ranks.items() if rank != usual}
    return {"r": usual, "lora_alpha": usual, "rank_pattern": others, "alpha_pattern": others}


def layer_in_memory(part: nn.Module, name: str) -> str:
    """Return the in-memory name of a tensor in a component's file.

    transformers 5.6 dropped `text_model.` in `CLIPTextModel`; files have it (see `file_name`) or lack it.
    """
    return name if hasattr(part, "text_model") else name.removeprefix(CLIP_PREFIX)


def file_name(part: nn.Module, name: str) -> str:
    """Return the file name of a tensor that all releases of transformers and diffusers read.

    Inverse of `layer_in_memory`.
    """
    if type(part).__name__ != "CLIPTextModel" or name.startswith(CLIP_PREFIX):
        return name
    return CLIP_PREFIX + name


@torch.no_grad()
def place_tensors(parts: Mapping[str, nn.Module], tensors: Mapping[str, torch.Tensor]) -> tuple[int, int]:
    """Copy an adapter's tensors into the parameters that loading it has created.

    The loaders of diffusers 0.42.1 and transformers 5.23 silently leave some at their initial values: DoRA's
    magnitudes in text encoders.

    Args:
        parts: components by name.
        tensors: the file's tensors by name.

    Returns:
        Number of tensors copied, and number of adapter parameters. For files with other programs' names,
        which are not copied, both are the number of parameters.
    """
    there: dict[str, torch.Tensor] = {}
    for component, part in parts.items():
        for name, parameter in part.named_parameters():
            if _IN_MEMORY.search(name):
                there[component + "." + _IN_MEMORY.sub(r".\1", name)] = parameter
    stored = {name: tensor for name, tensor in tensors.items() if not name.endswith("alpha")}
    if not all(IN_FILE.search(name) and name.partition(".")[0] in parts for name in stored):
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
