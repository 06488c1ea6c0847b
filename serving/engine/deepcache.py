"""The deep part of a UNet left out in every other step of a row (DeepCache, Ma et al., arXiv 2312.00858).

Between two steps the deep features of a UNet change little. So a row's steps take turns: one is a whole
pass, whose features on their way into the last block are kept; the next runs the first and the last block
only, with the features that were kept. Which of them a step is depends on the row's own steps, the first
being whole. So a picture is the same alone and in any batch, though not quite the one without.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch


class DeepCache:
    """Takes hold of a UNet's blocks, all but the first and the last.

    Args:
        unet: a UNet2DConditionModel of at least two levels.
    """

    def __init__(self, unet: Any) -> None:
        down, up = unet.down_blocks[1:], unet.up_blocks[:-1]
        self._last = up[-1]
        self._residuals = {block: len(block.resnets) + (block.downsamplers is not None) for block in down}
        self._given: torch.Tensor | None = None
        self._made = torch.empty(0)
        for block in (*down, unet.mid_block, *up):
            if block is not None:
                block.forward = partial(self._pass, block, block.forward)

    def call(self, given: torch.Tensor | None, work: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Make a pass of N rows.

        Args:
            given: N x ..., what `made` was in their last one; None: this one is whole.
            work: calls the UNet.
        """
        self._given = given
        try:
            return work()
        finally:
            self._given = None

    @property
    def made(self) -> torch.Tensor:
        """N x channels x height x width: the features of the last whole pass."""
        return self._made

    def _pass(self, block: Any, forward: Callable[..., Any], *args: Any, **named: Any) -> Any:
        if self._given is None:
            result = forward(*args, **named)
            if block is self._last:
                self._made = result
            return result
        if block is self._last:
            return self._given
        sample = args[0] if args else named["hidden_states"]
        # What deep blocks hand to each other is not looked at, but the UNet counts the residuals.
        return (sample, (sample,) * self._residuals[block]) if block in self._residuals else sample
