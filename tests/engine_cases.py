"""What runs on each of two ranks in the tests of the engine: small models whose steps are known."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ray_jobs.config import WHOLE_TENSORS, TrainConfig
from ray_jobs.diffusion.precision import to_precision
from ray_jobs.training import flat
from ray_jobs.training.bandwidth import bus_bandwidth, slow_network
from ray_jobs.training.engine import Engine
from ray_jobs.training.memory import state_bytes
from ray_jobs.training.optimizers import SCALARS
from ray_jobs.training.phases import stage_at, stages_of
from ray_jobs.training.setup import build_engine
from ray_jobs.training.state import (
    Shards,
    load_state,
    load_weights,
    snapshot,
    whole,
    write_shard,
)

# Engine, precision and stage.
VARIANTS = [("deepspeed", "fp32", stage) for stage in (0, 1, 2, 3)]
VARIANTS += [("deepspeed", "bf16", stage) for stage in (1, 2, 3)]
VARIANTS += [
    (engine, precision, stage)
    for engine in ("flat", "flat chunks")
    for precision in ("fp32", "bf16")
    for stage in (0, 1, 2)
]
ONE = torch.ones(1)
SMALL_CHUNK = 1  # elements: each parameter is then a chunk of its own


class SmallModel(nn.Module):
    """What an engine asks of a model beside its parameters, as of `FineTuning`."""

    host_weights = None

    def move(self, device: torch.device) -> None:
        self.to(device)

    def cast(self, dtype: torch.dtype) -> None:
        to_precision(self, dtype)


class TwoLayers(SmallModel):
    """Two layers without biases, four weights of 1 each; the gradient of each weight is its input."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 1, bias=False), nn.Linear(4, 1, bias=False)
        for layer in (self.first, self.second):
            nn.init.ones_(layer.weight)
        self.all_trained = list(self.named_parameters())
        self.layer_groups = {"other": dict(self.all_trained)}
        self.moved = 0  # how often all of it was sent to a device

    def _apply(self, *arguments: Any, **options: Any) -> "TwoLayers":
        self.moved += 1
        super()._apply(*arguments, **options)
        return self

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        inputs = inputs.to(self.first.weight.dtype)
        return (self.first(inputs) + self.second(inputs)).float().sum()


class Layers(SmallModel):
    """A layer in the group `first`, and one with a bias and a norm in `other`."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.norm = nn.Linear(4, 3, bias=False), nn.Linear(4, 3), nn.LayerNorm(4)
        self.all_trained = list(self.named_parameters())
        members = {
            group: {name: p for name, p in self.all_trained if name.startswith("first") == (group == "first")}
            for group in ("first", "other")
        }
        self.layer_groups = members

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.first(inputs).sum() + self.second(inputs).sum() + self.norm(inputs).sum()


PIECES = [256.0, *7 * [1.0]]  # gradients; in bf16 256 + 1 is 256
SHARE = 1 / 16  # of a piece in the loss: two ranks have eight each


def gradient_in_pieces(loop: dict[str, Any]) -> dict[str, Any]:
    """Norm and state of a step whose pieces have the gradients `PIECES`, for each weight."""
    found = {}
    for engine_name, precision, zero_stage in VARIANTS:
        train = TrainConfig(
            method="full",
            engine=engine_name.split()[0],
            precision=precision,
            zero_stage=zero_stage,
            micro_batch_size=1,
        )
        model = TwoLayers()
        engine = built(model, train, in_chunks="chunks" in engine_name)
        if isinstance(engine, flat.Flat):
            engine.rehearse({"inputs": torch.full((1, 4), 7.0)}, ONE)  # must leave nothing behind
        for number, gradient in enumerate(PIECES, start=1):
            inputs = {"inputs": torch.full((1, 4), gradient)}
            engine.accumulate(inputs, SHARE * ONE, last=number == len(PIECES))
        told, norm = engine.update(torch.ones(2))
        found[f"{engine_name} {precision} {zero_stage}"] = {
            "norm": norm.item(),
            "told": told.tolist(),
            "state": state_bytes(engine),
            "moved": model.moved,
        }
    return found


def built(model: nn.Module, train: TrainConfig, *, in_chunks: bool) -> Engine:
    """An engine, the flat one with one chunk or many."""
    before = flat.CHUNK
    flat.CHUNK = SMALL_CHUNK if in_chunks else before
    try:
        return build_engine(model, train, 2)  # type: ignore[arg-type]
    finally:
        flat.CHUNK = before


def told_of_bandwidth(loop: dict[str, Any]) -> list[Any]:
    """Bus bandwidth of a message of 1 MiB, and what is said of one of 1 KiB."""
    device = torch.device("cpu")
    return [bus_bandwidth(device, 1 << 20), slow_network(device, num_bytes=1 << 10)]


LAST = 7
STAGED = {
    "schedule": "constant",
    "learning_rate": 0.1,
    "batch_size": 2,
    "max_grad_norm": 1e9,
    "groups": {"first": ["first*"]},
    "stages": [
        {"steps": 2, "trainable": ["first"], "weight_decay": 0.5},
        {"steps": 3, "trainable": ["other"], "weight_decay": 0.2},
        {"steps": 2, "trainable": ["first", "other"], "weight_decay": 0.0},
    ],
}
ENGINES: dict[str, dict[str, Any]] = {
    str(stage): {"zero_stage": stage, "engine": "deepspeed"} for stage in range(4)
}
ENGINES |= {
    f"flat {stage}{chunks}": {"zero_stage": stage, "engine": "flat"}
    for stage in range(3)
    for chunks in ("", ", chunks")
}
ENGINES |= {f"{stage} offloaded": {"zero_stage": stage, "offload_optimizer": True} for stage in (1, 2, 3)}
ENGINES["all offloaded"] = {"zero_stage": 3, "offload_optimizer": True, "offload_parameters": True}
# While `first` is frozen, before it is trained again, after its first step.
RESTARTS = [("0", "3", 4), ("3", "2 offloaded", 5), ("all offloaded", "0", 5), ("1", "1", 6)]
RESTARTS += [("flat 0", "3", 4), ("2", "flat 1", 5), ("flat 2", "flat 0, chunks", 6)]
SWITCHED = STAGED | {
    "groups": {},
    "betas": [0.8, 0.9],
    "stages": [
        {"steps": 2, "optimizer": "lion", "weight_decay": 0.5},
        {"steps": 3, "optimizer": "adamw", "weight_decay": 0.2},
        {"steps": 2, "optimizer": "lion", "weight_decay": 0.0},
    ],
}
SWITCHING = [name for name in ENGINES if "flat" in name]
# In the middle of a stage, at its end, after the first step of the next, with another division among ranks.
SWITCHED_RESTARTS = [("flat 0", "flat 2", 1), ("flat 2", "flat 1, chunks", 2), ("flat 1", "flat 0", 6)]
LION_ONLY = STAGED | {"optimizer": "lion", "groups": {}, "stages": [], "weight_decay": 0.5}
BY_LION = ["1", "2", "3", "2 offloaded", "flat 1"]
OPTIMIZERS = ["adam", "nadam", "sgd", "adafactor", "muon", "prodigy", "schedule_free"]
BY_OTHERS = ["0", "2", "3", "1 offloaded", "flat 2"]  # what divides tensors anyhow
BY_WHOLE = ["flat 0", "flat 0, chunks"]
Weights = dict[str, list[Any]]  # of a step, by parameter
FOUND = 0.05  # Prodigy's estimate before the first step; by its own, few steps would move nothing
SCALARS["prodigy"] |= {"distance": FOUND, "largest": FOUND}


def alone(name: str) -> dict[str, Any]:
    """Settings of a training by one optimizer."""
    rate = {"sgd": 0.01, "prodigy": 1.0}.get(name, 0.1)
    own: dict[str, Any] = {
        "optimizer": name,
        "groups": {},
        "stages": [],
        "weight_decay": 0.5,
        "learning_rate": rate,
    }
    own["betas"] = [0.9, 0.999]  # torch's own
    own |= {"momentum": 0.8} if name in ("sgd", "muon") else {}
    return STAGED | own | ({"ema_decay": 0} if name == "schedule_free" else {})


def input_of(step: int) -> torch.Tensor:
    return step * torch.tensor([[1.0, -2.0, 3.0, 4.0]])


def climb(name: str, first: int, last: int, resumed: Path | None, settings: Any = STAGED) -> Any:
    """Weights to evaluate after each step from `first` to `last` of one of `ENGINES`, and the engine."""
    train = TrainConfig.model_validate(settings | ENGINES[name])
    stages, model = stages_of(train, LAST), Layers()
    shards = Shards(resumed, 2) if resumed else None
    if shards:
        load_weights(shards, model.all_trained)
    engine = built(model, train, in_chunks="chunks" in name)
    if shards:
        engine.use_optimizer(stage_at(stages, first - 1).optimizer)
        load_state(shards, engine)
    engine.enter_stage(stage_at(stages, first), None)
    seen: list[Weights] = []
    for step in range(first, last + 1):
        stage = stage_at(stages, step)
        if step == stage.first and step > 1:
            engine.enter_stage(stage, stages[stages.index(stage) - 1])
        engine.set_hyperparameters(stage, step)
        engine.accumulate({"inputs": input_of(step)}, ONE / 2, last=True)
        engine.update(torch.zeros(1))
        found = whole(engine, engine.evaluated)
        seen.append({name: values.tolist() for name, values in found.items()})
    return seen, engine


def weights_in_stages(loop: dict[str, Any]) -> dict[str, dict[str, list[Weights]]]:
    """For each of three schedules: of each engine, and of some with a restart between."""
    folder = Path(loop["folder"])
    return {
        "frozen": in_stages(folder, STAGED, list(ENGINES), RESTARTS),
        "switched": in_stages(folder, SWITCHED, SWITCHING, SWITCHED_RESTARTS),
        "lion": in_stages(folder, LION_ONLY, BY_LION, [("2", "flat 1", 3)]),
        **{name: by_one(folder / name, name) for name in OPTIMIZERS},
    }


def by_one(folder: Path, name: str) -> dict[str, list[Weights]]:
    """Of each engine that has an optimizer, and of some with a restart between."""
    if name in WHOLE_TENSORS:
        return in_stages(folder, alone(name), BY_WHOLE, [("flat 0", "flat 0, chunks", 3)])
    return in_stages(folder, alone(name), BY_OTHERS, [("2", "flat 2", 3), ("flat 2", "3", 3)])


def in_stages(
    folder: Path, settings: Any, engines: list[str], restarts: list[tuple[str, str, int]]
) -> dict[str, list[Weights]]:
    rank = torch.distributed.get_rank()
    found = {name: climb(name, 1, LAST, None, settings)[0] for name in engines}
    for before, after, pause in restarts:
        seen, engine = climb(before, 1, pause, None, settings)
        there = folder / f"{before}, {after}"
        write_shard(there, rank, 2, *snapshot(engine, {}))
        torch.distributed.barrier()
        found[there.name] = seen + climb(after, pause + 1, LAST, there, settings)[0]
    return found


def expected_in_stages() -> list[Weights]:
    """By torch's own AdamW, made anew for what is trained again; biases and norms do not decay."""
    model, seen = Layers(), []
    optimizers: dict[str, torch.optim.AdamW] = {}
    for step in range(1, LAST + 1):
        decay, trained = ((0.5, "f"), (0.2, "sn"), (0.0, "fsn"))[(step > 2) + (step > 5)]
        now = {name: p for name, p in model.all_trained if name[0] in trained}
        optimizers = {name: optimizers.get(name) or torch.optim.AdamW([p], lr=0.1) for name, p in now.items()}
        model.zero_grad()
        model(input_of(step)).backward()
        for name, optimizer in optimizers.items():
            optimizer.param_groups[0]["weight_decay"] = decay if name.split(".")[0] != "norm" else 0.0
            if name == "second.bias":
                optimizer.param_groups[0]["weight_decay"] = 0.0
            optimizer.step()
        seen.append({name: p.tolist() for name, p in model.all_trained})
    return seen


def expected_of_switches(*, only_lion: bool = False) -> list[Weights]:
    """By torch's own AdamW and by Lion as its paper writes it, each made anew where it begins."""
    model, seen = Layers(), []
    named = dict(model.all_trained)
    averages = {name: torch.zeros_like(p) for name, p in named.items()}
    for step in range(1, LAST + 1):
        stage = (step > 2) + (step > 5)
        decay, lion = (0.5, True) if only_lion else ((0.5, True), (0.2, False), (0.0, True))[stage]
        first, second = (0.9, 0.999) if only_lion else (0.8, 0.9)
        if step == 3:
            adam = {name: torch.optim.AdamW([p], lr=0.1, betas=(first, second)) for name, p in named.items()}
        if step == 6 and not only_lion:
            averages = {name: torch.zeros_like(p) for name, p in named.items()}
        model.zero_grad()
        model(input_of(step)).backward()
        for name, p in named.items():
            assert p.grad is not None
            own = decay if p.ndim > 1 else 0.0
            if not lion:
                adam[name].param_groups[0]["weight_decay"] = own
                adam[name].step()
                continue
            with torch.no_grad():
                interpolated = first * averages[name] + (1 - first) * p.grad
                p.sub_(0.1 * (torch.sign(interpolated) + own * p))
                averages[name] = second * averages[name] + (1 - second) * p.grad
        seen.append({name: p.tolist() for name, p in named.items()})
    return seen


def expected_by(name: str) -> list[Weights]:
    """By torch's own optimizer or optimizers, or as the paper writes it; biases and norms do not decay."""
    if name in ("prodigy", "schedule_free"):
        return expected_of_prodigy() if name == "prodigy" else [seen for seen, _ in expected_schedule_free()]
    model, seen = Layers(), []
    rate = alone(name)["learning_rate"]
    optimizers: list[torch.optim.Optimizer] = []
    for _, p in model.all_trained:
        own = {"lr": rate, "weight_decay": 0.5 if p.ndim > 1 else 0.0}
        if name == "adam":
            optimizers.append(torch.optim.Adam([p], **own))
        elif name == "nadam":
            optimizers.append(torch.optim.NAdam([p], decoupled_weight_decay=True, **own))
        elif name == "sgd":
            optimizers.append(torch.optim.SGD([p], momentum=0.8, **own))
        elif name == "adafactor":
            optimizers.append(torch.optim.Adafactor([p], **own))
        elif p.ndim == 2:
            optimizers.append(torch.optim.Muon([p], momentum=0.8, adjust_lr_fn="match_rms_adamw", **own))
        else:
            optimizers.append(torch.optim.AdamW([p], **own))
    for step in range(1, LAST + 1):
        model.zero_grad()
        model(input_of(step)).backward()
        for optimizer in optimizers:
            optimizer.step()
        seen.append({name: p.tolist() for name, p in model.all_trained})
    return seen


def expected_of_prodigy() -> list[Weights]:
    """By algorithm 4 of arXiv 2306.06101 in float64, all weights as one vector."""
    model, seen = Layers(), []
    parameters = [p for _, p in model.all_trained]
    decay = torch.cat([torch.full((p.numel(),), 0.5 if p.ndim > 1 else 0.0) for p in parameters]).double()
    x = torch.cat([p.detach().flatten() for p in parameters]).double()
    first, r, d, s, m, v = (
        x.clone(),
        0.0,
        FOUND,
        torch.zeros_like(x),
        torch.zeros_like(x),
        torch.zeros_like(x),
    )
    for k in range(1, LAST + 1):
        model.zero_grad()
        model(input_of(k)).backward()
        g = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]).double()
        step = d * (1 - 0.999**k) ** 0.5 / (1 - 0.9**k)
        m, v = 0.9 * m + 0.1 * d * g, 0.999 * v + 0.001 * d**2 * g**2
        r = 0.999**0.5 * r + d * step * float(g @ (first - x))
        s = 0.999**0.5 * s + d * d * g
        x = x - step * decay * x
        x = x - step * m / (v.sqrt() + d * 1e-8)
        d = max(d, r / float(s.abs().sum()))
        pieces = x.float().split([p.numel() for p in parameters])
        for p, piece in zip(parameters, pieces, strict=True):
            p.data = piece.view_as(p).clone()
        seen.append({name: p.tolist() for name, p in model.all_trained})
    return seen


def expected_schedule_free() -> list[tuple[Weights, Weights]]:
    """By algorithm 1 of arXiv 2405.15682 at a constant rate: where gradients are taken, and the averages."""
    model, seen = Layers(), []
    x = {name: p.detach().clone() for name, p in model.all_trained}
    z, v = dict(x), {name: torch.zeros_like(p) for name, p in x.items()}
    for step in range(1, LAST + 1):
        model.zero_grad()
        model(input_of(step)).backward()
        for name, y in model.all_trained:
            assert y.grad is not None
            v[name] = 0.999 * v[name] + 0.001 * y.grad**2
            scaled = y.grad / ((v[name] / (1 - 0.999**step)).sqrt() + 1e-8)
            z[name] = z[name] - 0.1 * (scaled + (0.5 if y.ndim > 1 else 0.0) * y.detach())
            x[name] = (1 - 1 / step) * x[name] + z[name] / step
            y.data = 0.1 * z[name] + 0.9 * x[name]
        one, other = (
            {name: each.tolist() for name, each in found.items()} for found in (dict(model.all_trained), x)
        )
        seen.append((one, other))
    return seen
