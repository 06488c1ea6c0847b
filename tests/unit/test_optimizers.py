"""Another optimizer in a stage of the schedule: it begins without moments, and a training resumes exactly."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from cluster.storage import Storage
from ray_jobs.config import WHOLE_TENSORS, Config, TrainConfig
from ray_jobs.data.feeding.dataset import Dataset
from ray_jobs.planning.estimate import moment_bytes
from ray_jobs.run.manifest import Manifest
from ray_jobs.training.checkpoint import PROGRESS, STATE, Resumed
from ray_jobs.training.engine import Engine
from ray_jobs.training.loop import LoopSettings, TrainingRun
from ray_jobs.training.memory import state_bytes
from ray_jobs.training.optimizers import SCALARS, Lion, Prodigy
from ray_jobs.training.setup import build_engine
from ray_jobs.training.startup import StartUp
from ray_jobs.training.state import load_weights, snapshot, whole, write_shard
from tests.engine_cases import (
    LAST,
    ONE,
    OPTIMIZERS,
    SWITCHED,
    Layers,
    alone,
    expected_by,
    expected_of_switches,
    expected_schedule_free,
    input_of,
)


def configured(**train: Any) -> Config:
    return Config.model_validate(
        {
            "name": "switched",
            "data": {"source": "unused"},
            "model": {"base": "unused"},
            "train": SWITCHED | {"num_workers": 1, "ema_decay": 0.5} | train,
            "search": {"learning_rates": [0.1], "ladder": [LAST]},
        }
    )


def begun(config: Config, resumed: Resumed | None = None) -> TrainingRun:
    """A training of `Layers` on one worker, whose steps this process takes."""
    model: Any = Layers()
    if resumed:
        load_weights(resumed.shards, model.all_trained)
    storage, inputs = Storage.open("unused"), None
    settings = LoopSettings(config, Dataset(storage, storage, Manifest()), "trial", config.search.ladder)
    engine = build_engine(model, config.train, 1)
    run = TrainingRun(settings, inputs, engine, lambda *_: None, resumed, StartUp())  # type: ignore[arg-type]
    run.start()
    return run


def climb(run: TrainingRun, last: int) -> None:
    for step in range(run.done + 1, last + 1):
        run.enter(step)
        run.engine.set_hyperparameters(run.stage, step)
        inputs = input_of(step).to(next(run.engine.module.parameters()).dtype)
        run.engine.accumulate({"inputs": inputs}, ONE, last=True)
        run.engine.update(torch.zeros(1))
        run._average(step)
        run.done = step


def kept(run: TrainingRun) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint."""
    return snapshot(run.engine, run.ema.averages if run.ema else {})[0]


def saved(run: TrainingRun, folder: Path) -> Resumed:
    write_shard(folder / STATE, 0, 1, *snapshot(run.engine, run.ema.averages if run.ema else {}))
    (folder / PROGRESS).write_text(json.dumps({"step": run.done, "why": "interval", "world_size": 1}))
    return Resumed(folder)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_training_resumes_to_the_bit_before_at_and_after_another_optimizer(
    precision: str, tmp_path: Path
) -> None:
    config = configured(precision=precision)
    whole = begun(config)
    climb(whole, LAST)
    for pause in range(1, LAST):
        first = begun(config)
        climb(first, pause)
        second = begun(config, saved(first, tmp_path / str(pause)))
        climb(second, LAST)
        expected, found = kept(whole), kept(second)
        assert expected.keys() == found.keys()
        for name, values in expected.items():
            assert torch.equal(values, found[name]), (pause, name)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_trains_as_torchs_own_does_and_resumes_to_the_bit(name: str, tmp_path: Path) -> None:
    config = configured(**alone(name))
    whole, expected = begun(config), expected_by(name)
    for step in range(1, LAST + 1):
        climb(whole, step)
        for piece in whole.engine.held:
            right = torch.tensor(expected[step - 1][piece.name]).flatten()
            torch.testing.assert_close(piece.weights, right, rtol=0, atol=2e-6)
    for precision, pause in (("fp32", 1), ("fp32", LAST - 1), ("bf16", 2)):
        config = configured(**alone(name), precision=precision)
        whole, first = begun(config), begun(config)
        climb(whole, LAST)
        climb(first, pause)
        second = begun(config, saved(first, tmp_path / f"{precision} {pause}"))
        climb(second, LAST)
        for moment, values in kept(whole).items():
            assert torch.equal(values, kept(second)[moment]), (precision, pause, moment)


def test_schedule_free_evaluates_the_averages_and_trains_on_what_is_not_averaged() -> None:
    run = begun(configured(**alone("schedule_free")))
    before = whole(run.engine, run.engine.evaluated)
    assert all(torch.equal(before[name], p.detach()) for name, p in run.engine.module.all_trained)
    for step, (_, averages) in enumerate(expected_schedule_free(), start=1):
        climb(run, step)
        for name, values in whole(run.engine, run.engine.evaluated).items():
            torch.testing.assert_close(values, torch.tensor(averages[name]), rtol=0, atol=2e-6)
    assert not torch.equal(values, whole(run.engine, run.engine.averaged)[name])


def test_prodigy_finds_the_size_of_its_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SCALARS, "prodigy", {"distance": 1e-6, "largest": 1e-6, "numerator": 0.0})
    weights = torch.tensor([3.0, -4.0])  # 5 from the minimum
    optimizer = Prodigy([{"params": [weights]}], lr=1.0, betas=(0.9, 0.999), eps=1e-8)
    for step in range(200):
        weights.grad = 2 * weights
        optimizer.param_groups[0]["lr"] = min(1.0, (step + 1) / 20)
        optimizer.step()
    assert weights.norm() < 0.05
    assert 1e-6 < optimizer.state[weights]["distance"] < 5  # a lower bound of it


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"ema_decay": 0.9}, "ema_decay: 0.9: schedule_free averages the weights itself; set it to 0"),
        (
            {"schedule": "cosine"},
            "schedule: cosine lowers the rate, in place of which schedule_free averages",
        ),
        ({"betas": [0.0, 0.9]}, "betas: schedule_free needs a first one above 0"),
        ({"stages": [{"steps": 2, "optimizer": "lion"}, {"steps": 2}]}, "use it in all stages or in none"),
        ({"stages": [{"steps": 2, "betas": [0.8, 0.9]}]}, r"stages\.0\.betas: schedule_free keeps its first"),
        (
            {"optimizer": "prodigy", "groups": {"a": ["*"]}, "stages": [{"steps": 2, "trainable": ["a"]}]},
            r"stages\.0\.trainable: .* prodigy trains the same layers from beginning to end",
        ),
    ],
)
def test_what_an_optimizer_of_all_layers_cannot_have_is_refused(train: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TrainConfig.model_validate({"optimizer": "schedule_free", "ema_decay": 0} | train)


@pytest.mark.parametrize("name", sorted(WHOLE_TENSORS))
def test_an_optimizer_of_whole_layers_is_refused_where_they_are_divided(name: str) -> None:
    def trained(**given: Any) -> TrainConfig:
        return TrainConfig.model_validate(given)

    with pytest.raises(
        ValidationError, match=f"{name} needs whole layers, which zero_stage: 2 divides among 2"
    ):
        trained(optimizer=name, num_workers=2)
    with pytest.raises(
        ValidationError, match=f"{name} needs whole layers, and offload_optimizer is DeepSpeed's"
    ):
        trained(stages=[{"steps": 2, "optimizer": name}], offload_optimizer=True)
    trained(optimizer=name, num_workers=2, zero_stage=0)
    with pytest.raises(ValidationError, match="betas: .* changes nothing with optimizer: sgd"):
        trained(optimizer="sgd", betas=(0.9, 0.99))


def test_weights_and_averages_go_on_where_an_optimizer_begins_without_moments() -> None:
    run = begun(configured())
    climb(run, 2)
    [weights, average] = (dict(each) for each in (run.engine.averaged, run.ema.averages if run.ema else {}))
    before = {name: each.clone() for name, each in [*weights.items(), *average.items()]}
    run.enter(3)
    assert run.engine.optimizer_name == "adamw" and isinstance(run.engine.optimizer, torch.optim.AdamW)
    assert all(torch.equal(each, before[name]) for name, each in average.items())
    for piece in run.engine.held:
        assert not any(
            run.engine.state_of(piece.owner)[moment].any() for moment in run.engine.moments_of(piece.owner)
        )
    for step, expected in enumerate(expected_of_switches(), start=1):
        if step == 3:
            climb(run, 3)
            for piece in run.engine.held:
                right = torch.tensor(expected[piece.name]).flatten()
                torch.testing.assert_close(piece.weights, right, rtol=0, atol=2e-6)


def test_lion_leaves_alone_what_has_no_gradient() -> None:
    with_gradient, without = torch.ones(3), torch.ones(3)
    with_gradient.grad = torch.tensor([2.0, -0.5, 0.0])
    optimizer = Lion([{"params": [with_gradient, without]}], lr=0.25, betas=(0.9, 0.99))
    optimizer.step()
    assert with_gradient.tolist() == [0.75, 1.25, 1.0] and without.tolist() == [1.0, 1.0, 1.0]
    assert len(optimizer.state) == 1


def test_memory_is_planned_for_the_stage_with_the_most_moments() -> None:
    def engine(**train: Any) -> Engine:
        return begun(configured(**train)).engine

    settings: list[dict[str, Any]] = [{"optimizer": "lion", "stages": []}, {"stages": []}, {}]
    of_lion, of_adamw, _ = (state_bytes(engine(**each))["moments"] for each in settings)
    assert of_adamw == 2 * of_lion
    assert [moment_bytes(configured(**each).train) for each in settings] == [4, 8, 8]
