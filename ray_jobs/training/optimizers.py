"""Optimizers by their names in `train.optimizer`, and what each keeps for a tensor that it updates.

Prodigy and Schedule-Free are written here, because the packages `prodigyopt` and `schedulefree` keep state
that no checkpoint of fragments holds; they give the same weights (1.1.2 and 1.4.1, 120 steps). Rprop is
left out: its steps follow signs of the gradient of the whole set, which batches do not have.
"""

from collections.abc import Iterable, Iterator, Mapping
from math import sqrt
from typing import Any

import torch

from ray_jobs.config import TrainConfig

MOST_MOMENTS = {
    **{"adamw": 2, "adam": 2, "nadam": 2, "lion": 1, "sgd": 1, "adafactor": 1, "muon": 2},
    **{"prodigy": 4, "schedule_free": 2},
}
"""The most numbers that an optimizer keeps for each that it updates."""

SCALARS: dict[str, dict[str, float]] = {
    "nadam": {"mu_product": 1.0},
    "prodigy": {"distance": 1e-6, "largest": 1e-6, "numerator": 0.0},
    "schedule_free": {"weight_sum": 0.0, "highest_rate": 0.0},
}
"""Numbers that an optimizer keeps for a tensor beside its steps, as they are before the first."""

FUSED = ("adamw", "adam", "sgd", "lion", "muon")
"""Optimizers that count their steps on the device or not at all; the others read the count at each step."""


def moments_of(name: str, shape: torch.Size) -> dict[str, torch.Size]:
    """Return the tensors that an optimizer keeps for one that it updates: their shapes by name."""
    if name == "adafactor" and len(shape) > 1:
        return {
            "row_var": torch.Size([*shape[:-1], 1]),
            "col_var": torch.Size([*shape[:-2], 1, shape[-1]]),
        }
    if name == "adafactor":
        names: tuple[str, ...] = ("variance",)
    elif name == "sgd" or (name == "muon" and len(shape) == 2):
        names = ("momentum_buffer",)
    elif name == "lion":
        names = ("exp_avg",)
    elif name == "prodigy":
        names = ("exp_avg", "exp_avg_sq", "sum", "first_weights")
    elif name == "schedule_free":
        names = ("unaveraged", "exp_avg_sq")
    else:
        names = ("exp_avg", "exp_avg_sq")
    return dict.fromkeys(names, shape)


def build_optimizer(
    name: str, groups: Iterable[dict[str, Any]], config: TrainConfig, *, fused: bool | None = None
) -> torch.optim.Optimizer:
    """Return an optimizer over groups as `engine.parameter_groups` returns them.

    Its hyperparameters are set before each step, by `engine.set_hyperparameters`.

    adamw: Loshchilov & Hutter, arXiv 1711.05101. adam: Kingma & Ba, arXiv 1412.6980. nadam: Dozat, ICLR
    workshop 2016, with AdamW's decay. lion: Chen et al., arXiv 2302.06675. adafactor: Shazeer & Stern, arXiv
    1804.04235. muon: `Muon`. prodigy: `Prodigy`. schedule_free: `ScheduleFree`.

    Args:
        fused: of AdamW, Adam and SGD: use one kernel for all tensors and arithmetic; None: as torch chooses.
    """
    own = [dict(group) for group in groups]  # torch adds settings to them
    rate = config.learning_rate
    if name == "lion":
        return Lion(own, lr=rate, betas=config.betas)
    if name == "muon":
        return Muon(own, lr=rate, fused=fused)
    if name == "adafactor":
        return torch.optim.Adafactor(own, lr=rate)
    if name == "sgd":
        return torch.optim.SGD(own, lr=rate, momentum=config.momentum, fused=fused)
    settings: Mapping[str, Any] = {"lr": rate, "betas": config.betas, "eps": config.epsilon}
    if name == "prodigy":
        return Prodigy(own, **settings)
    if name == "schedule_free":
        return ScheduleFree(own, **settings)
    if name == "nadam":
        return torch.optim.NAdam(own, decoupled_weight_decay=True, **settings)
    kind = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[name]
    return kind(own, fused=fused, **settings)


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


class Muon(torch.optim.Optimizer):
    """Muon for matrices (https://kellerjordan.github.io/posts/muon/), and AdamW for all other tensors.

    A matrix moves by its orthogonalised momentum, scaled so that one learning rate suits both (Liu et al.,
    arXiv 2502.16982, eq. 4).
    """

    def __init__(self, groups: list[dict[str, Any]], *, lr: float, fused: bool | None) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0})
        self.parts: list[tuple[dict[str, Any], torch.optim.Optimizer]] = []
        for group in self.param_groups:
            matrices = [weights for weights in group["params"] if weights.ndim == 2]
            others = [weights for weights in group["params"] if weights.ndim != 2]
            if matrices:
                self.parts.append((group, torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw")))
            if others:
                self.parts.append((group, torch.optim.AdamW(others, fused=fused)))
        for _, part in self.parts:
            part.state = self.state

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update the tensors that have a gradient."""
        assert closure is None
        for group, part in self.parts:
            own = ("momentum",) if isinstance(part, torch.optim.Muon) else ("betas", "eps")
            names = [name for name in ("lr", "weight_decay", *own) if name in group]
            part.param_groups[0].update({name: group[name] for name in names})
            part.step()


class _Counting(torch.optim.Optimizer):
    """An optimizer that counts the steps of each tensor, and keeps scalars of it, on the CPU."""

    name: str

    def __init__(
        self, groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})

    def _with_gradients(self) -> Iterator[tuple[dict[str, Any], torch.Tensor, torch.Tensor, dict[str, Any]]]:
        """Yield group, weights, gradient and state of each tensor that has a gradient."""
        for group in self.param_groups:
            for weights in group["params"]:
                if weights.grad is None:
                    continue
                state = self.state[weights]
                for name, value in ({"step": 0.0} | SCALARS[self.name]).items():
                    state.setdefault(name, torch.tensor(value))
                for name, shape in moments_of(self.name, weights.shape).items():
                    if name not in state:
                        state[name] = weights.new_zeros(shape)
                yield group, weights, weights.grad, state


class Prodigy(_Counting):
    """Prodigy (Mishchenko & Defazio, arXiv 2306.06101, algorithm 4): AdamW that finds the size of its steps.

    With the corrections of Adam's biases, and with an estimate that a warm-up of the learning rate does not
    lower: the denominator leaves the rate out. The estimate is one for all tensors; each keeps it.
    """

    name = "prodigy"

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update the tensors that have a gradient."""
        assert closure is None
        found = list(self._with_gradients())
        if not found:
            return
        group, *_, state = found[0]
        rate, (first, second) = group["lr"], group["betas"]
        distance, largest, numerator = (state[name].item() for name in SCALARS[self.name])
        share, count = sqrt(second), int(state["step"]) + 1
        step = distance * rate * sqrt(1 - second**count) / (1 - first**count)
        relative = distance / SCALARS[self.name]["distance"]  # for numbers of a size that float32 has
        products, sums = [], []
        for _, weights, gradient, state in found:
            if count == 1:
                state["first_weights"].copy_(weights)
            products.append(torch.sum(gradient * (state["first_weights"] - weights)))
            state["exp_avg"].mul_(first).add_(gradient, alpha=distance * (1 - first))
            state["exp_avg_sq"].mul_(second).addcmul_(gradient, gradient, value=distance**2 * (1 - second))
            state["sum"].mul_(share).add_(gradient, alpha=relative * distance)
            sums.append(state["sum"].abs().sum())
        product, denominator = torch.stack([torch.stack(products).sum(), torch.stack(sums).sum()]).tolist()
        numerator = share * numerator + relative * step * product
        if denominator and rate:
            estimate = numerator / denominator
            largest = max(largest, estimate)
        following = largest if denominator and rate else distance
        for group, weights, _, state in found:
            weights.mul_(1 - group["weight_decay"] * step)
            scale = state["exp_avg_sq"].sqrt().add_(distance * group["eps"])
            weights.addcdiv_(state["exp_avg"], scale, value=-step)
            state["step"] += 1
            for name, value in zip(SCALARS[self.name], (following, largest, numerator), strict=True):
                state[name].fill_(value)


class ScheduleFree(_Counting):
    """Schedule-Free AdamW (Defazio et al., arXiv 2405.15682, algorithm 1).

    The weights are those at which gradients are taken; those to evaluate follow from them (`evaluate`).
    """

    name = "schedule_free"

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update the tensors that have a gradient."""
        assert closure is None
        for group, weights, gradient, state in self._with_gradients():
            rate, (first, second) = group["lr"], group["betas"]
            unaveraged = state["unaveraged"]
            if not state["step"]:
                unaveraged.copy_(weights)
            state["step"] += 1
            state["highest_rate"].clamp_(min=rate)
            weight = state["highest_rate"].item() ** 2
            total = state["weight_sum"].add_(weight).item()
            share = weight / total if total else 0.0
            state["exp_avg_sq"].mul_(second).addcmul_(gradient, gradient, value=1 - second)
            scale = (state["exp_avg_sq"] / (1 - second ** int(state["step"]))).sqrt_().add_(group["eps"])
            direction = (gradient / scale).add_(weights, alpha=group["weight_decay"])
            weights.lerp_(unaveraged, share).add_(direction, alpha=rate * (first * (1 - share) - 1))
            unaveraged.sub_(direction, alpha=rate)


def evaluate(weights: torch.Tensor, unaveraged: torch.Tensor, first_beta: float) -> None:
    """Turn weights of `ScheduleFree` into those to evaluate, in place."""
    weights.lerp_(unaveraged, 1 - 1 / first_beta)
