"""Learning rates at their steps, and the stages of a run."""

import json
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from ray_jobs.config import TrainConfig
from ray_jobs.diffusion.schedules import LearningRateSchedule
from ray_jobs.training.phases import ever_trainable, stage_at, stages_of


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (LearningRateSchedule("constant", 10, warmup_steps=4), {0: 1, 9: 1}),
        (LearningRateSchedule("constant_with_warmup", 10, warmup_steps=4), {0: 0.2, 3: 0.8, 4: 1, 9: 1}),
        (LearningRateSchedule("linear", 12, warmup_steps=2), {0: 1 / 3, 2: 1, 7: 0.5, 12: 0}),
        (LearningRateSchedule("linear", 10, end=0.1), {0: 1, 5: 0.55, 10: 0.1}),
        (LearningRateSchedule("cosine", 8), {0: 1, 2: 0.853553, 4: 0.5, 8: 0}),
        (LearningRateSchedule("cosine_with_restarts", 8, cycles=2), {0: 1, 2: 0.5, 4: 1, 6: 0.5, 8: 0}),
        (LearningRateSchedule("polynomial", 10, power=2.0), {0: 1, 5: 0.25, 10: 0}),
        (LearningRateSchedule("warmup_stable_decay", 10, decay_share=0.4), {0: 1, 6: 1, 8: 0.5, 10: 0}),
    ],
)
def test_a_schedule_gives_the_rate_worked_out_by_hand(
    schedule: LearningRateSchedule, expected: dict[int, float]
) -> None:
    assert {step: schedule.factor(step) for step in expected} == pytest.approx(expected, abs=1e-6)


def test_an_unknown_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match="schedule: unknown name 'sawtooth'"):
        LearningRateSchedule("sawtooth", 10).factor(1)


def staged() -> TrainConfig:
    return TrainConfig.model_validate(
        {
            "method": "full",
            "learning_rate": 1e-3,
            "warmup_steps": 0,
            "groups": {"attention": ["*attn*"]},
            "stages": [
                {"steps": 3, "trainable": ["attention"]},
                {"steps": 1, "learning_rate": 1e-4, "schedule": "linear"},
            ],
        }
    )


def test_stages_follow_each_other_and_the_last_goes_on_to_the_end_of_the_ladder() -> None:
    stages = stages_of(staged(), 7)
    assert [(stage.first, stage.last) for stage in stages] == [(1, 3), (4, 7)]
    assert [stage_at(stages, step).first for step in (1, 3, 4, 7)] == [1, 1, 4, 4]
    assert [stages[0].rate(step) for step in (1, 3)] == [1e-3, 1e-3]
    assert [stages[1].rate(step) for step in (4, 6)] == pytest.approx([1e-4, 0.5e-4])
    assert stages[0].trains("attention") and not stages[0].trains("other")
    assert ever_trainable(staged()) is None


Moves = dict[str, tuple[bool, bool, bool]]  # of a parameter: is attention, moved in stage 1, in stage 2


def train_in_stages(folder: Path, base: Path) -> dict[str, Moves]:
    """Six steps on one rank under both engines, in a process of its own."""
    import torch

    os.environ["LOCAL_RANK"] = "0"  # DeepSpeed asks for it; Ray Train sets it
    torch.distributed.init_process_group("gloo", f"file://{folder}/rendezvous", rank=0, world_size=1)
    engines: list[dict[str, Any]] = [{"engine": "flat"}]
    engines += [{"engine": "deepspeed", "zero_stage": stage} for stage in (0, 2, 3)]
    return {json.dumps(engine): train_under(base, engine) for engine in engines}


def train_under(base: Path, engine_settings: dict[str, Any]) -> Moves:
    import torch

    from ray_jobs.config import Config
    from ray_jobs.training.setup import build_engine, build_model
    from ray_jobs.weights.loading import load_pipeline

    settings = staged().model_copy(update={**engine_settings, "num_workers": 1})
    config = Config.model_validate(
        {
            "name": "staged",
            "data": {"source": "unused"},
            "model": {"base": str(base)},
            "train": settings.model_dump(exclude_unset=True),
            "search": {"learning_rates": [1e-3], "ladder": [6]},
        }
    )
    _, model = build_model(config)
    engine = build_engine(model, config.train, 1)
    from tests.unit.test_finetuning import inputs

    batch = inputs(load_pipeline(str(base)), model)
    stages = stages_of(config.train, 6)

    def weights() -> dict[str, torch.Tensor]:
        return {piece.name: piece.weights.clone() for piece in engine.held}

    seen = [weights()]
    for number, stage in enumerate(stages):
        engine.enter_stage(stage, stages[number - 1] if number else None)
        for step in range(stage.first, stage.last + 1):
            engine.set_hyperparameters(stage, step)
            engine.accumulate(batch, torch.ones(1), last=True)
            engine.update(torch.zeros(1))
        seen.append(weights())
    return {
        name: (
            "attn" in name,
            not torch.equal(seen[0][name], seen[1][name]),
            not torch.equal(seen[1][name], seen[2][name]),
        )
        for name in seen[0]
    }


def test_frozen_layers_stay_bit_by_bit_until_their_stage_begins(tiny_model: Path, tmp_path: Path) -> None:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        trained = pool.submit(train_in_stages, tmp_path, tiny_model).result()
    for engine, found in trained.items():
        assert {attention for attention, _, _ in found.values()} == {True, False}
        for name, (attention, first, second) in found.items():
            assert first == attention, (engine, name)
            assert second, (engine, name)
