"""Exponential moving average of the trained weights, which is evaluated and published."""

from collections.abc import Iterable

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn


class EMA:
    """Exponential moving averages of named parameters, in float32.

    The decay is warmed up as min(decay, (1 + step) / (10 + step)), so that the averages do not stay close
    to the initial weights during the first steps.
    """

    def __init__(self, parameters: Iterable[tuple[str, torch.Tensor]], decay: float) -> None:
        self.decay = decay
        self.averages = {name: value.detach().float().clone() for name, value in parameters}

    @torch.no_grad()
    def update(self, parameters: Iterable[tuple[str, torch.Tensor]], step: int) -> None:
        """Move the averages towards `parameters`, after optimizer step `step` (from 1)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        moved = {name: value.detach().float() for name, value in parameters}
        if moved:  # with many workers, some may own nothing
            # All at once: on a GPU, launching one kernel per layer would cost more than the arithmetic.
            averages = [self.averages[name] for name in moved]
            get_ema_multi_avg_fn(decay)(averages, list(moved.values()), step)
