"""How many rows fit is tried before the first step, leaves nothing behind, and is learned from failures."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.storage import Storage
from ray_jobs.config import Config, TrainConfig
from ray_jobs.data.encoding.shapes import square_latents
from ray_jobs.diffusion.finetuning import FineTuning
from ray_jobs.training.batch import InputMaker, Piece, loss_shares
from ray_jobs.training.flat import Flat
from ray_jobs.training.loop import LoopSettings
from ray_jobs.training.rehearsal import (
    blank,
    halved_when_it_does_not_fit,
    held_rows,
    rows_at_once,
    rows_that_fit,
)
from ray_jobs.training.setup import build_model
from ray_jobs.weights.encoders import Encoders
from tests.tiny_models import FAMILY_MODELS

CPU = torch.device("cpu")


def configured(base: Path, **train: Any) -> Config:
    return Config.model_validate(
        {
            "name": "rehearsed",
            "data": {"source": "pictures", "resolution": 64},
            "model": {"base": str(base)},
            "search": {"learning_rates": [1e-3], "ladder": [2]},
            "train": {"batch_size": 8, "num_workers": 1, **train},
        }
    )


def a_training(config: Config) -> tuple[Flat, InputMaker]:
    pipeline, model = build_model(config)
    empty = Encoders(config.model.base).encode_captions([""])
    maker = InputMaker(pipeline.vae, model, empty, CPU, seed=0, caption_dropout=0.1)
    return Flat(model, config.train, 1, CPU), maker


def allow(engine: Flat, rows: int) -> list[int]:
    """Let the denoiser run out of memory with more rows; the list returned gets the numbers tried."""
    tried = []

    def limited(module: torch.nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        tried.append(len(named["timestep"]))
        if tried[-1] > rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    assert isinstance(engine.module, FineTuning)
    engine.module.denoiser.register_forward_pre_hook(limited, with_kwargs=True)
    return tried


@pytest.mark.parametrize("model", FAMILY_MODELS)
def test_blank_rows_are_like_those_of_a_data_set(tiny: Callable[[str], Path], model: str) -> None:
    config = configured(tiny(model))
    engine, maker = a_training(config)
    assert rows_that_fit(engine, maker, square_latents(config), 2) == 2
    inputs, weights = maker.make(blank(maker, square_latents(config), 2), 0)
    assert engine.accumulate(inputs, weights, last=True).isfinite()


@pytest.mark.parametrize(("most", "allowed", "expected"), [(8, 8, 8), (8, 5, 4), (7, 3, 2), (8, 1, 1)])
def test_rows_are_halved_until_they_fit(tiny_flux: Path, most: int, allowed: int, expected: int) -> None:
    config = configured(tiny_flux)
    engine, maker = a_training(config)
    tried = allow(engine, allowed)
    assert rows_that_fit(engine, maker, square_latents(config), most) == expected
    assert tried[0] == most and tried[-1] == expected


def test_a_single_row_that_does_not_fit_is_an_error(tiny_flux: Path) -> None:
    config = configured(tiny_flux)
    engine, maker = a_training(config)
    allow(engine, 0)
    with pytest.raises(torch.OutOfMemoryError):
        rows_that_fit(engine, maker, square_latents(config), 8)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_rehearsal_leaves_nothing_behind(tiny_flux: Path, method: str) -> None:
    found = []
    for rehearsed in (False, True):
        config = configured(tiny_flux, method=method, precision="bf16")
        engine, maker = a_training(config)
        shape = square_latents(config)
        if rehearsed:
            rows_that_fit(engine, maker, shape, 8)
            assert all(chunk.kept is None for chunk in engine.chunks)
            assert all(parameter.grad is None for parameter in engine.module.parameters())
        for step in (1, 2):
            pieces = [blank(maker, shape, 2)] * 2
            for number, piece in enumerate(pieces):
                engine.accumulate(*maker.make(piece, step), last=number == len(pieces) - 1)
            engine.update(torch.zeros(1))
        found.append([owner.weights for owner in engine.owners])
    for plain, after in zip(*found, strict=True):
        assert plain.equal(after)


def test_a_failure_halves_the_rows_of_the_next_start(tmp_path: Path) -> None:
    trial, told = Storage.open(str(tmp_path)), list[str]()
    config = TrainConfig(batch_size=16, num_workers=2, gradient_checkpointing=True)

    def fail(config: TrainConfig) -> None:
        with (
            pytest.raises(torch.OutOfMemoryError, match="lower train.micro_batch_size, set train.grad.*GiB"),
            halved_when_it_does_not_fit(config, trial, "trial-0", 2, told.append),
        ):
            raise torch.OutOfMemoryError("Tried to allocate 20.00 GiB")

    assert held_rows(trial) is None
    for expected in (4, 2, 1):
        fail(config.model_copy(update={"micro_batch_size": held_rows(trial)}))
        assert held_rows(trial) == expected
    assert told[0].startswith("trial-0: GPU memory holds 4 of 8 images at once")
    fail(config.model_copy(update={"micro_batch_size": 1}))
    assert len(told) == 3


def test_a_failure_that_shall_stop_leaves_the_rows_as_they_are(tmp_path: Path) -> None:
    trial = Storage.open(str(tmp_path))
    with (
        pytest.raises(torch.OutOfMemoryError),
        halved_when_it_does_not_fit(TrainConfig(on_oom="stop"), trial, "trial-0", 2, print),
    ):
        raise torch.OutOfMemoryError
    assert held_rows(trial) is None


@pytest.mark.parametrize(
    ("rows", "workers", "micro", "expected"), [(16, 2, None, 8), (5, 2, 4, 3), (8, 1, 3, 3)]
)
def test_rows_at_once_are_those_of_a_worker_and_at_most_a_micro_batch(
    rows: int, workers: int, micro: int | None, expected: int
) -> None:
    train = TrainConfig(batch_size=rows, num_workers=workers, micro_batch_size=micro)
    assert rows_at_once(train, workers) == expected


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_equal_pieces_repeat_rows_without_weight(world_size: int) -> None:
    shares, total = loss_shares(TrainConfig(batch_size=7)), dict.fromkeys(range(7), 0.0)
    sizes = set()
    for rank in range(world_size):
        mine = torch.arange(7).tensor_split(world_size)[rank]
        for piece in Piece.cut({"row": mine}, shares, world_size, rank, 2, equal=True):
            assert piece.rows["row"].tolist() == piece.places
            sizes.add(len(piece.places))
            for place, weight in zip(piece.places, piece.weights, strict=True):
                total[place] += weight
    assert list(total.values()) == shares and len(sizes) == 1


@pytest.mark.parametrize(("given", "left", "expected"), [(None, 4, 4), (2, 4, 2), (8, 4, 4), (8, None, 8)])
def test_what_a_failure_left_is_a_limit_and_no_more(
    given: int | None, left: int | None, expected: int, tmp_path: Path
) -> None:
    config = configured(tmp_path, micro_batch_size=given)
    settings = LoopSettings(config, None, "trial-0", [2])  # type: ignore[arg-type]
    assert settings.with_rows(left).config.train.micro_batch_size == expected
