"""Exponential moving average of the trained weights: what is evaluated and published."""

from collections.abc import Iterable

import torch


class EMA:
    """Averages named parameters, in float32.

    The decay is warmed up as min(decay, (1 + step) / (10 + step)), so that the first steps do not
    cling to the initial weights.
    """

    def __init__(self, parameters: Iterable[tuple[str, torch.Tensor]], decay: float) -> None:
        self.decay = decay
        self.averages = {name: value.detach().float().clone() for name, value in parameters}

    @torch.no_grad()
    def update(self, parameters: Iterable[tuple[str, torch.Tensor]], step: int) -> None:
        """Move the averages towards `parameters`, after optimizer step `step` (from 1)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, value in parameters:
            self.averages[name].lerp_(value.detach().float(), 1 - decay)
