"""How many rows fit is tried before the first step, leaves nothing behind, and is learned from failures."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.storage import Storage
from ray_jobs.config import Config, TrainConfig
from ray_jobs.data.encoding.shapes import square_latents
from ray_jobs.diffusion.finetuning import FineTuning
from ray_jobs.diffusion.pack import Pack
from ray_jobs.training.batch import InputMaker, Piece, loss_shares
from ray_jobs.training.flat import Flat
from ray_jobs.training.loop import LoopSettings
from ray_jobs.training.packed_steps import PackedInputs, accumulate, rehearse
from ray_jobs.training.rehearsal import (
    blank,
    halved_when_it_does_not_fit,
    held_rows,
    rows_at_once,
    rows_that_fit,
)
from ray_jobs.training.setup import build_engines, build_model, build_pack
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


def rehearsal(engine: Flat, maker: InputMaker, config: Config) -> Callable[[int], None]:
    return lambda rows: engine.rehearse(*maker.make(blank(maker, square_latents(config), rows), 0))


def a_pack(configs: Sequence[Config]) -> tuple[Pack, list[Flat], PackedInputs]:
    pipeline, pack = build_pack(configs)
    empty = Encoders(configs[0].model.base).encode_captions([""])
    makers = [
        InputMaker(pipeline.vae, member, empty, CPU, seed=0, caption_dropout=0.1)
        for member in pack.members.values()
    ]
    return pack, build_engines(pack, configs, 1), PackedInputs(makers)


def allow(model: FineTuning, rows: int) -> list[int]:
    """Let the denoiser run out of memory with more rows; the list returned gets the numbers tried."""
    tried = []

    def limited(module: torch.nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        tried.append(len(named["timestep"]))
        if tried[-1] > rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    model.denoiser.register_forward_pre_hook(limited, with_kwargs=True)
    return tried


@pytest.mark.parametrize("model", FAMILY_MODELS)
def test_blank_rows_are_like_those_of_a_data_set(tiny: Callable[[str], Path], model: str) -> None:
    config = configured(tiny(model))
    engine, maker = a_training(config)
    assert rows_that_fit(rehearsal(engine, maker, config), 2) == 2
    inputs, weights = maker.make(blank(maker, square_latents(config), 2), 0)
    assert engine.accumulate(inputs, weights, last=True).isfinite()


@pytest.mark.parametrize(("most", "allowed", "expected"), [(8, 8, 8), (8, 5, 4), (7, 3, 2), (8, 1, 1)])
def test_rows_are_halved_until_they_fit(tiny_flux: Path, most: int, allowed: int, expected: int) -> None:
    config = configured(tiny_flux)
    engine, maker = a_training(config)
    assert isinstance(engine.module, FineTuning)
    tried = allow(engine.module, allowed)
    assert rows_that_fit(rehearsal(engine, maker, config), most) == expected
    assert tried[0] == most and tried[-1] == expected


def test_a_single_row_that_does_not_fit_is_an_error(tiny_flux: Path) -> None:
    config = configured(tiny_flux)
    engine, maker = a_training(config)
    assert isinstance(engine.module, FineTuning)
    allow(engine.module, 0)
    with pytest.raises(torch.OutOfMemoryError):
        rows_that_fit(rehearsal(engine, maker, config), 8)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_rehearsal_leaves_nothing_behind(tiny_flux: Path, method: str) -> None:
    found = []
    for is_rehearsed in (False, True):
        config = configured(tiny_flux, method=method, precision="bf16")
        engine, maker = a_training(config)
        shape = square_latents(config)
        if is_rehearsed:
            rows_that_fit(rehearsal(engine, maker, config), 8)
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


@pytest.mark.parametrize(("allowed", "expected"), [(24, 8), (23, 4), (12, 4), (3, 1)])
def test_a_pack_is_rehearsed_with_the_rows_of_all_its_trials(
    tiny_flux: Path, allowed: int, expected: int
) -> None:
    configs = [configured(tiny_flux, learning_rate=rate) for rate in (1e-3, 2e-3, 3e-3)]
    pack, engines, inputs = a_pack(configs)
    tried = allow(pack.model, allowed)
    shape = square_latents(configs[0])

    def try_rows(rows: int) -> None:
        rehearse(pack, engines, inputs, blank(inputs.makers[0], shape, rows))

    assert rows_that_fit(try_rows, rows_at_once(configs[0].train, 1)) == expected
    assert tried[0] == 24 and tried[-1] == 3 * expected


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_rehearsal_of_a_pack_leaves_nothing_behind(tiny_flux: Path, precision: str) -> None:
    found = []
    for is_rehearsed in (False, True):
        lora = {"rank": 4, "alpha": 4, "dropout": 0.1}
        rates = (1e-3, 2e-3)
        configs = [configured(tiny_flux, learning_rate=r, precision=precision, lora=lora) for r in rates]
        pack, engines, inputs = a_pack(configs)
        shape = square_latents(configs[0])
        if is_rehearsed:
            rehearse(pack, engines, inputs, blank(inputs.makers[0], shape, 8))
            assert all(chunk.kept is None for engine in engines for chunk in engine.chunks)
            assert all(parameter.grad is None for parameter in pack.parameters())
        for step in (1, 2):
            begun = [inputs.begin({0: blank(inputs.makers[0], shape, 2)}, step) for _ in range(2)]
            accumulate(pack, engines, inputs, begun, [0, 1], step=step, rank=0)
            for engine in engines:
                engine.update(torch.zeros(1))
        found.append([owner.weights for engine in engines for owner in engine.owners])
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
        pytest.raises(torch.OutOfMemoryError, match="than there is: lower search.pack, set train.grad"),
        halved_when_it_does_not_fit(TrainConfig(on_oom="stop"), trial, "pack", 2, print, lower="search.pack"),
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
