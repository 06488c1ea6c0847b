"""What a DeepSpeed engine makes of a step, on two workers and with numbers that are known beforehand."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ray_jobs.config import TrainConfig
from ray_jobs.training.engine import build_engine, enter_stage, set_hyperparameters
from ray_jobs.training.memory import state_bytes
from ray_jobs.training.stages import stage_at, stages_of
from ray_jobs.training.state import (
    Shards,
    load_state,
    load_weights,
    owned_fragments,
    snapshot,
    whole,
    write_shard,
)
from tests.workers import Workers

STAGES = {"fp32": (0, 1, 2, 3), "bf16": (1, 2, 3)}
Case = Callable[[dict[str, Any]], Any]


class TwoLayers(nn.Module):
    """Two layers without biases, four weights of 1 each, in the groups `first` and `other`."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 1, bias=False), nn.Linear(4, 1, bias=False)
        for layer in (self.first, self.second):
            nn.init.ones_(layer.weight)
        self.all_trained = list(self.named_parameters())
        self.layer_groups = {
            "first": {"first.weight": self.first.weight},
            "other": {"second.weight": self.second.weight},
        }

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        inputs = inputs.to(self.first.weight.dtype)
        return (self.first(inputs) + self.second(inputs)).float().sum()


def on_ranks(case: Case, folder: Path, workers: Workers, **arguments: Any) -> list[Any]:
    """What a function returns on each rank; it is given `arguments`."""

    def run(loop: dict[str, Any]) -> None:
        torch.set_num_threads(1)
        rank = torch.distributed.get_rank()
        Path(loop["folder"], f"{rank}.json").write_text(json.dumps(case(loop)))

    workers.run(run, {"folder": str(folder), **arguments})
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


PIECES = [256.0, *7 * [1.0]]  # gradients; in bf16 256 + 1 is 256


def gradient_in_pieces(loop: dict[str, Any]) -> dict[str, Any]:
    """Norm and state of a step whose pieces have the gradients `PIECES`, for each weight."""
    found = {}
    for precision, zero_stages in STAGES.items():
        for zero_stage in zero_stages:
            train = TrainConfig(precision=precision, zero_stage=zero_stage, micro_batch_size=1)
            engine = build_engine(TwoLayers(), train, 2)  # type: ignore[arg-type]
            for gradient in PIECES:
                engine.backward(engine(torch.full((1, 4), gradient)))
                engine.step()
            norm = float(engine.get_global_grad_norm())
            found[f"{precision} {zero_stage}"] = {"norm": norm, "state": state_bytes(engine)}
    return found


def test_the_gradient_of_a_step_in_pieces_is_exact_at_every_stage_and_in_bf16(
    two_workers: Workers, tmp_path: Path
) -> None:
    exact = sum(PIECES) / len(PIECES) * 8**0.5
    for found in on_ranks(gradient_in_pieces, tmp_path, two_workers):
        assert len(found) == 7
        for variant, step in found.items():
            assert step["norm"] == pytest.approx(exact, rel=1e-6), variant
        of_bf16 = [found[f"bf16 {stage}"]["state"]["gradients"] for stage in STAGES["bf16"]]
        assert of_bf16 == [8 * 4, 4 * 4, 4 * 4]  # in fp32 while they are summed


STAGED = {
    "learning_rate": 0.1,
    "schedule": "constant",
    "weight_decay": 0.0,
    "batch_size": 2,
    "max_grad_norm": 1e9,
    "groups": {"first": ["first*"]},
    "stages": [
        {"steps": 3, "trainable": ["first"]},
        {"steps": 5, "trainable": ["other"]},
        {"steps": 3, "trainable": ["first", "other"]},
    ],
}
LAST = 11


def weights_in_stages(loop: dict[str, Any]) -> dict[str, list[list[float]]]:
    """One weight of each layer after each step, by the ZeRO stages before and after a restart.

    The gradient of step n is n, so that moments that were kept would show.
    """
    rank, folder = torch.distributed.get_rank(), Path(loop["folder"])

    def climb(zero_stage: int, first: int, last: int, resumed: Path | None) -> tuple[list[list[float]], Any]:
        train = TrainConfig.model_validate(STAGED | {"zero_stage": zero_stage})
        stages, model = stages_of(train, LAST), TwoLayers()
        shards = Shards(resumed, 2) if resumed else None
        if shards:
            load_weights(shards, model.all_trained)
        engine = build_engine(model, train, 2)  # type: ignore[arg-type]
        if shards:
            load_state(shards, engine)
        enter_stage(engine, stage_at(stages, first), None)
        seen = []
        for step in range(first, last + 1):
            stage = stage_at(stages, step)
            if step == stage.first and step > 1:
                enter_stage(engine, stage, stages[stages.index(stage) - 1])
            set_hyperparameters(engine, stage, step)
            engine.backward(engine(torch.full((1, 4), float(step))))
            engine.step()
            pieces = {piece.key: piece.weights for piece in owned_fragments(engine)}
            seen.append([values[0, 0].item() for values in whole(engine, pieces).values()])
        return seen, engine

    found = {}
    for zero_stage in range(4):
        found[f"{zero_stage}"], _ = climb(zero_stage, 1, LAST, None)
    # While `first` is frozen, before it is trained again, after its first step.
    for before, after, pause in ((0, 3, 5), (3, 2, 8), (2, 0, 8), (1, 1, 9)):
        seen, engine = climb(before, 1, pause, None)
        there = folder / f"{before} {after} {pause}"
        write_shard(there, rank, 2, *snapshot(engine, {}))
        torch.distributed.barrier()
        found[there.name] = seen + climb(after, pause + 1, LAST, there)[0]
    return found


def test_a_layer_that_is_trained_again_starts_like_a_new_one_at_every_stage_and_after_a_restart(
    two_workers: Workers, tmp_path: Path
) -> None:
    found, _ = on_ranks(weights_in_stages, tmp_path, two_workers)
    expected = expected_in_stages()
    assert expected[7][0] - expected[8][0] == pytest.approx(0.1)  # Adam's first step is the learning rate
    assert len(found) == 8
    for variant, seen in found.items():
        assert torch.allclose(torch.tensor(seen), expected, rtol=0, atol=1e-6), variant


def expected_in_stages() -> torch.Tensor:
    """By torch's AdamW, made anew for a layer that comes back: steps x layers."""
    layers = [torch.ones(1, requires_grad=True) for _ in range(2)]
    trained = [(0,)] * 3 + [(1,)] * 5 + [(0, 1)] * 3
    optimizers, seen = {}, []
    for step, now in enumerate(trained, start=1):
        optimizers = {
            number: optimizers.get(number) or torch.optim.AdamW([layers[number]], lr=0.1, weight_decay=0.0)
            for number in now
        }
        for number, optimizer in optimizers.items():
            layers[number].grad = torch.full((1,), float(step))
            optimizer.step()
        seen.append(torch.cat(layers).detach().clone())
    return torch.stack(seen)
