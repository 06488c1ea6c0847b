"""Optimizers, which all update each element by itself, so that an engine may divide their tensors anyhow."""

from collections.abc import Iterable
from typing import Any

import torch

from ray_jobs.config import TrainConfig

MOMENTS: dict[str, tuple[str, ...]] = {"adamw": ("exp_avg", "exp_avg_sq"), "lion": ("exp_avg",)}
"""Tensors that an optimizer keeps for each that it updates, of the same shape, by `train.optimizer`."""


def build_optimizer(
    name: str, groups: Iterable[dict[str, Any]], config: TrainConfig, *, fused: bool | None = None
) -> torch.optim.Optimizer:
    """Return an optimizer of `MOMENTS` over groups as `engine.parameter_groups` returns them.

    adamw: Loshchilov & Hutter, arXiv 1711.05101. lion: Chen et al., arXiv 2302.06675.

    Args:
        fused: AdamW: use one kernel for all tensors and all of its arithmetic; None: as torch chooses.
    """
    own = [dict(group) for group in groups]  # torch adds settings to them
    if name == "lion":
        return Lion(own, lr=config.learning_rate, betas=config.betas)
    return torch.optim.AdamW(
        own, lr=config.learning_rate, betas=config.betas, eps=config.epsilon, fused=fused
    )


class Lion(torch.optim.Optimizer):
    """Lion (arXiv 2302.06675, algorithm 2): steps of the learning rate by the sign of a moving average."""

    def __init__(self, groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float]) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update the tensors that have a gradient."""
        assert closure is None
        for group in self.param_groups:
            first, second = group["betas"]
            for weights in group["params"]:
                if weights.grad is None:
                    continue
                state, gradient = self.state[weights], weights.grad
                if "exp_avg" not in state:
                    state["exp_avg"] = torch.zeros_like(weights)
                average = state["exp_avg"]
                update = average.lerp(gradient, 1 - first).sign_()
                weights.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])
                average.lerp_(gradient, 1 - second)
