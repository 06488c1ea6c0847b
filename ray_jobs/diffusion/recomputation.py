"""Which blocks of a denoiser are computed again in the backward pass instead of keeping their activations."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

Recompute = Callable[..., Any]
"""Function that calls a block with its arguments, and again in the backward pass."""

recomputed: Recompute = partial(checkpoint, use_reentrant=False)
"""PyTorch's own."""


class EveryNth:
    """Function that runs the first of every `every` blocks by another function, and the others as they are.

    Blocks are counted in the order of their first call.
    """

    def __init__(self, every: int, recompute: Recompute = recomputed) -> None:
        self.every, self.recompute = every, recompute
        self.numbers: dict[Callable[..., Any], int] = {}

    def __call__(self, block: Callable[..., Any], *args: Any, **named: Any) -> Any:
        number = self.numbers.setdefault(block, len(self.numbers))
        if number % self.every:
            return block(*args, **named)
        return self.recompute(block, *args, **named)


def stacked_blocks(denoiser: nn.Module) -> list[nn.Module]:
    """Return the blocks of a denoiser that is no UNet: those in lists, most of which are alike."""
    return [block for part in denoiser.children() if isinstance(part, nn.ModuleList) for block in part]
