"""Skip the deep blocks of a UNet in every other step of a row (DeepCache, Ma et al., arXiv 2312.00858).

The deep features of a UNet change little between two steps. So a row's steps alternate: a full pass keeps the
features that enter the last block; the next step runs the first and the last block only, with those features.
The alternation follows the row's own steps and begins with a full pass. So an image is the same alone and in
any batch, but differs slightly from the one without DeepCache.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ray_jobs.diffusion.protocols import Denoiser


class DeepCache:
    """Wrap all blocks of a UNet but the first and the last.

    Args:
        denoiser: a UNet2DConditionModel with at least two levels.
    """

    def __init__(self, denoiser: Denoiser) -> None:
        down, up = denoiser.down_blocks[1:], denoiser.up_blocks[:-1]
        self._last = up[-1]
        self._residuals = {block: len(block.resnets) + (block.downsamplers is not None) for block in down}
        self._given: torch.Tensor | None = None
        self._made = torch.empty(0)
        for block in (*down, denoiser.mid_block, *up):
            if block is not None:
                block.forward = partial(self._pass, block, block.forward)

    def call(self, given: torch.Tensor | None, work: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Run a pass of N rows.

        Args:
            given: N x ..., the value of `made` after the rows' last pass; None: run a full pass.
            work: function that calls the UNet.
        """
        self._given = given
        try:
            return work()
        finally:
            self._given = None

    @property
    def made(self) -> torch.Tensor:
        """Features of the last full pass, N x channels x height x width."""
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
        # The outputs of the skipped blocks are never used, but the UNet counts the residuals.
        return (sample, (sample,) * self._residuals[block]) if block in self._residuals else sample
