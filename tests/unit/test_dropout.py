"""Dropout of the denoiser's own layers in full training: as seeded, only while it trains, exactly resumed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ray_jobs.config import Config
from ray_jobs.training.setup import build_engine, build_model, check_settings
from ray_jobs.training.state import Shards, load_state, load_weights, snapshot, write_shard
from ray_jobs.training.steps import seed_dropout
from ray_jobs.weights.loading import load_pipeline
from tests.unit.test_pack import Rows, alone, configured, enter

DROPOUT = torch.nn.modules.dropout._DropoutNd


def full(base: Path, folder: Path, **train: Any) -> Config:
    own: dict[str, Any] = {"method": "full", "learning_rate": 1e-3, "caption_dropout": 0.0, "dropout": 0.3}
    return configured(base, folder, **own | train)


def probabilities(denoiser: torch.nn.Module) -> set[float]:
    return {layer.p for layer in denoiser.modules() if isinstance(layer, DROPOUT)}


def test_masks_are_replayed_where_activations_are_recomputed_and_none_are_drawn_from_what_is_saved(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    base = tiny("FluxPipeline")
    rows = Rows(base)
    losses, weights = alone(full(base, tmp_path), rows, tmp_path / "kept")
    again, recomputed = alone(
        full(base, tmp_path, gradient_checkpointing=True), rows, tmp_path / "recomputed"
    )
    assert losses == pytest.approx(again, rel=1e-6)
    for name, values in weights.items():
        torch.testing.assert_close(recomputed[name], values, rtol=0, atol=1e-6, msg=name)
    plain, _ = alone(full(base, tmp_path, dropout=0.0), rows, tmp_path / "plain")
    # How much a mask moves a loss depends on the processor's kernels; that it moves each one does not.
    assert min(abs(one - other) for one, other in zip(losses, plain, strict=True)) > 1e-4
    saved = load_pipeline(str(tmp_path / "kept"))
    assert probabilities(saved.transformer) == {0.0} and not saved.transformer.training


def test_a_resumed_training_draws_the_masks_that_it_would_have_drawn(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    from ray_jobs.training.phases import stages_of

    base = tiny("FluxPipeline")
    rows, config = Rows(base), full(base, tmp_path, num_workers=1)
    [stage] = stages_of(config.train, 2)

    def step(number: int, before: Path | None, after: Path) -> float:
        pipeline, model = build_model(config)
        assert probabilities(model.denoiser) == {0.3} and model.denoiser.training
        shards = Shards(before, 1) if before else None
        if shards:
            load_weights(shards, model.all_trained)
        maker, engine = rows.maker(config, pipeline, model), build_engine(model, config.train, 1)
        if shards:
            load_state(shards, engine)
        enter(engine, [stage], number)  # type: ignore[arg-type]
        seed_dropout(torch.device("cpu"), 0, number, 0)
        inputs, weights = maker.make(rows.pieces(config, maker)[0], number)
        loss = engine.accumulate(inputs, weights, last=True).item()
        engine.update(torch.zeros(1))
        write_shard(after, 0, 1, *snapshot(engine, {}))
        return loss

    step(1, None, tmp_path / "1")
    torch.manual_seed(12345)  # whatever happened between
    losses = [step(2, tmp_path / "1", tmp_path / name) for name in ("2", "again")]
    assert losses[0] == losses[1] == pytest.approx(alone(config, rows, tmp_path / "whole")[0][1], rel=1e-6)


@pytest.mark.parametrize("name", ["HiDreamImagePipeline", "Krea2Pipeline"])
def test_a_denoiser_without_dropout_layers_that_it_uses_refuses_the_setting(
    name: str, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(
        ValueError, match=r"train\.dropout: \w+ has no dropout layers that it uses; leave it out"
    ):
        check_settings(full(tiny(name), tmp_path))
