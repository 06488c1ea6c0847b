"""Precisions by their names in configurations, and casts to them."""

import torch

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a condition in the denoiser's dtype; integers and masks stay as they are."""
    return tensor.to(dtype) if tensor.is_floating_point() else tensor
