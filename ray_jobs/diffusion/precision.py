"""Precisions by their names in configurations, and casts to them."""

import torch
from torch import nn

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a condition in the denoiser's dtype; integers and masks stay as they are."""
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def kept_in_float32(module: nn.Module) -> dict[nn.Parameter, torch.Tensor]:
    """Return the frozen parameters that components name in `_keep_in_fp32_modules`, with their values.

    diffusers and transformers load them in float32 whatever the precision; `Module.to` would cast them.
    """
    return {
        parameter: parameter.data
        for part in module.modules()
        if (names := getattr(part, "_keep_in_fp32_modules", None))
        for name, parameter in part.named_parameters()
        if not parameter.requires_grad and not set(names).isdisjoint(name.split("."))
    }


def to_precision(module: nn.Module, dtype: torch.dtype) -> None:
    """Cast a module's parameters and buffers in place, but those of `kept_in_float32`."""
    kept = kept_in_float32(module)
    nn.Module.to(module, dtype)  # diffusers' own warns of any cast
    for parameter, data in kept.items():
        parameter.data = data
