"""DoRA of LyCORIS, OneTrainer and kohya's kin as peft's: `dora_scale` is its vector of magnitudes.

These programs train `dora_scale * (W + update) / norm(W + update)` (Liu et al., arXiv 2402.09353), with norms
of the rows of the sum, as peft has them, or of its columns, as no vector of peft's has them.
"""

from collections.abc import Iterable, Mapping

import torch

SCALE = "dora_scale"
MERGE = "merge it into the base with the program that trained it, and import the model"


def magnitude(name: str, scale: torch.Tensor, down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Return a layer's magnitudes in peft's shape: out, or 1 x out x 1 x 1 of a convolution.

    Args:
        name: of `scale`, for errors.
        scale: out x 1, or out x 1 x 1 x 1.

    Raises:
        ValueError: the norms are of something else than the rows.
    """
    if not scale.dim() or not len(scale) == scale.numel() == len(up):
        raise ValueError(
            f"{name}: {tuple(scale.shape)}: DoRA is read with one norm for each of the {len(up)} outputs, "
            f"not by inputs; {MERGE}"
        )
    return scale.reshape(1, -1, *[1] * (down.dim() - 2)) if down.dim() > 2 else scale.flatten()


def converted_magnitudes(
    scales: Mapping[str, torch.Tensor],
    stored: Mapping[str, torch.Tensor],
    converted: Mapping[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    """Return peft's vectors for the `dora_scale` of a file whose other tensors diffusers has renamed.

    Args:
        scales: those, by the names of kohya's kin.
        stored: the others, by these names too.
        converted: the others by diffusers' names, the down projections unchanged.

    Raises:
        ValueError: see `magnitude`; or a layer is several in diffusers.
    """
    layers = {id(tensor): name.removesuffix(".lora_A.weight") for name, tensor in converted.items()}
    found = {}
    for name, scale in scales.items():
        down = stored.get(f"{name.removesuffix(SCALE)}lora_down.weight")
        if down is None or id(down) not in layers:
            raise ValueError(f"{name}: diffusers has no single layer for it; {MERGE}")
        layer = layers[id(down)]
        norms = magnitude(name, scale, down, converted[f"{layer}.lora_B.weight"])
        found[f"{layer}.lora_magnitude_vector"] = norms
    return found


def require_all_or_none(names: Iterable[str]) -> None:
    """Raise ValueError if only some layers of a component have magnitudes: peft's DoRA is of them all.

    Args:
        names: of an adapter's tensors in diffusers' format.
    """
    places = [name.partition(".lora_")[::2] for name in names]
    decomposed = {layer for layer, part in places if part == "magnitude_vector"}
    components = {layer.partition(".")[0] for layer in decomposed}
    for layer in sorted({layer for layer, _ in places} - decomposed):
        if layer.partition(".")[0] in components:
            raise ValueError(
                f"{layer} has no DoRA, and {min(decomposed)} has; it is in all layers or in none: {MERGE}"
            )
