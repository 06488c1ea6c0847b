"""LoHa and LoKr of LyCORIS as LoRA of a larger rank, which is the same update.

LoHa (Hyeon-Woo et al., arXiv 2108.06098) multiplies two updates of rank r element by element: rank r^2.
LoKr is the Kronecker product of a small matrix and an update of rank r: r times the smaller side of that
matrix.
"""

import re
from collections.abc import Mapping

import torch

_PART = r"\.(?P<part>hada_\w+|lokr_\w+|alpha)$"
_ANY_LAYER = re.compile(rf"^(?P<layer>.+){_PART}")
# Other layers' names have no dots, or are those of ComfyUI.
_NAME = re.compile(rf"^(?P<layer>[^.]+|diffusion_model\..+){_PART}")
_LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")

Parts = Mapping[str, torch.Tensor]


def as_low_rank(stored: Parts, *, any_layer: bool = False) -> dict[str, torch.Tensor]:
    """Return an adapter's tensors with its LoHa and LoKr layers as `lora_up`, `lora_down` and `alpha`.

    Args:
        stored: by the names of LyCORIS, kohya's programs and ComfyUI; others are returned as they are.
        any_layer: read layers of any name, which otherwise have those of these programs.

    Raises:
        ValueError: a layer has a form that is no LoRA, or of no useful rank.
    """
    layers: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in stored.items():
        if found := (_ANY_LAYER if any_layer else _NAME).match(name):
            layers.setdefault(found["layer"], {})[found["part"]] = tensor
    result = dict(stored)
    for layer, parts in layers.items():
        if parts.keys() <= {"alpha"}:
            continue
        loha = any(part.startswith("hada_") for part in parts)
        up, down, scale = (_loha if loha else _lokr)(layer, parts)
        for part in parts:
            del result[f"{layer}.{part}"]
        result[f"{layer}.lora_up.weight"], result[f"{layer}.lora_down.weight"] = up, down
        result[f"{layer}.alpha"] = torch.tensor(scale * len(down))
    return result


def _loha(layer: str, parts: Parts) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Return up, down and scale: each pair of columns, and of rows, multiplied."""
    if set(_LOHA) != parts.keys() - {"alpha"}:
        raise ValueError(f"{layer}: this form of LoHa has no LoRA; export it as LoRA with LyCORIS")
    up_1, down_1, up_2, down_2 = (parts[name].float() for name in _LOHA)
    rank = len(down_1)
    up = (up_1[:, :, None] * up_2[:, None, :]).flatten(1)
    down = (down_1[:, None, :] * down_2[None, :, :]).flatten(0, 1)
    return up, down, float(parts.get("alpha", torch.tensor(rank))) / rank


def _lokr(layer: str, parts: Parts) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Return up, down and scale, with the small matrix on the side where the rank is smaller.

    Programs divide alpha by the rank of the second factor.
    """
    known = {"lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b", "alpha"}
    if parts.keys() - known or "lokr_w2_a" not in parts:
        raise ValueError(
            f"{layer}: this LoKr has a second factor of full rank, which no LoRA has; merge it into the base "
            "with LyCORIS and import the model"
        )
    small = parts["lokr_w1"] if "lokr_w1" in parts else parts["lokr_w1_a"] @ parts["lokr_w1_b"]
    small, up, down = small.float(), parts["lokr_w2_a"].float(), parts["lokr_w2_b"].float()
    rank = len(down)
    scale = float(parts.get("alpha", torch.tensor(rank))) / rank
    rows, columns = small.shape
    if rows < columns:
        return torch.kron(torch.eye(rows), up), torch.kron(small, down), scale
    return torch.kron(small, up), torch.kron(torch.eye(columns), down), scale
