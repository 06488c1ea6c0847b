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
from ray_jobs.training.optimizers import Lion
from ray_jobs.training.setup import build_engine
from ray_jobs.training.startup import StartUp
from ray_jobs.training.state import load_weights, snapshot, write_shard
from tests.engine_cases import (
    LAST,
    ONE,
    OPTIMIZERS,
    SWITCHED,
    Layers,
    alone,
    expected_by,
    expected_of_switches,
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
    assert run.ema
    return snapshot(run.engine, run.ema.averages)[0]


def saved(run: TrainingRun, folder: Path) -> Resumed:
    assert run.ema
    write_shard(folder / STATE, 0, 1, *snapshot(run.engine, run.ema.averages))
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
