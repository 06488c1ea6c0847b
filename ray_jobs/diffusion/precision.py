"""Precisions by their names in configurations, and casts to them."""

from weakref import WeakKeyDictionary, ref

import torch
from torch import nn

from ray_jobs.diffusion.protocols import Component

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a condition in the denoiser's dtype; integers and masks stay as they are."""
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


_deciding: WeakKeyDictionary[nn.Module, ref[nn.Parameter]] = WeakKeyDictionary()


def dtype_of(component: Component) -> torch.dtype:
    """Return the dtype in which a component computes, as its own `dtype` does.

    diffusers' property walks through all modules at each call, which for adapters on a large model takes
    milliseconds of each step. Here the parameter that decides is looked for once.
    """
    known = _deciding.get(component)
    parameter = known() if known else None
    if parameter is None:
        kept = getattr(component, "_keep_in_fp32_modules", None) or ()
        for name, each in component.named_parameters():
            if each.is_floating_point() and not any(part in name for part in kept):
                _deciding[component], parameter = ref(each), each
                break
    return component.dtype if parameter is None else parameter.dtype


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
