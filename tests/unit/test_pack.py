"""Adapters that are trained together end as each does alone."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ray_jobs.config import Config, ConfigError
from ray_jobs.diffusion.ema import EMA
from ray_jobs.planning.footprint import check_rows
from ray_jobs.planning.memory import Model
from ray_jobs.planning.packs import with_pack
from ray_jobs.training.batch import InputMaker, Piece, loss_shares
from ray_jobs.training.engine import pieces_a_step
from ray_jobs.training.flat import Flat
from ray_jobs.training.packed_steps import PackedInputs, accumulate
from ray_jobs.training.phases import Stage, stage_at, stages_of
from ray_jobs.training.setup import (
    build_engine,
    build_engines,
    build_model,
    build_pack,
    check_settings,
    exporter,
)
from ray_jobs.training.state import snapshot, whole
from ray_jobs.training.steps import seed_dropout
from ray_jobs.weights.encoders import Encoders
from tests.tiny_models import FAMILY_MODELS, half_painted

CPU = torch.device("cpu")
CAPTIONS = ["a small red circle", "a blue cross", "", "a green square"]
STEPS = 3

Settings = Mapping[str, Any]


EDITS = {"sources": [{"path": "unused", "reference_columns": ["before"], "mask_column": "mask"}]}


def configured(base: Path, folder: Path, data: Settings | None = None, **train: Any) -> Config:
    settings = {
        "method": "lora",
        "batch_size": 4,
        "num_workers": 1,
        "warmup_steps": 0,
        "learning_rate": 1e-2,
        "caption_dropout": 0.3,
        "epsilon": 1e-3,  # with Adam's own, an element whose gradient is nearly 0 moves by its rounding
        **train,
    }
    return Config.model_validate(
        {
            "name": "pack",
            "storage": str(folder),
            "data": {**(data or {"source": "unused"}), "resolution": 64},
            "model": {"base": str(base)},
            "train": settings,
            "search": {"learning_rates": [1e-3], "ladder": [STEPS]},
        }
    )


class Rows:
    """Encoded rows of four pictures, and the inputs' makers."""

    def __init__(self, base: Path, seed: int = 0) -> None:
        encoders = Encoders(str(base))
        generator = torch.Generator().manual_seed(seed)
        pixels = torch.randint(0, 256, (4, 64, 64, 3), dtype=torch.uint8, generator=generator).numpy()
        mean, logvar = encoders.encode_pictures(pixels)
        self.empty = encoders.encode_captions([""])
        sizes = torch.tensor([[64, 64, 0, 0, 64, 64]] * 4, dtype=torch.int32)
        self.columns = {
            "latents_mean": mean,
            "latents_logvar": logvar,
            "conditioning": sizes,
            **encoders.encode_masked(half_painted(pixels)),
            "reference_0": mean.flip(0),
            "mask": torch.rand((4, 1, *mean.shape[2:]), generator=generator),
            **encoders.encode_captions(CAPTIONS),
        }

    def maker(self, config: Config, pipeline: Any, model: Any) -> InputMaker:
        return InputMaker(
            pipeline.vae,
            model,
            self.empty,
            CPU,
            seed=0,
            caption_dropout=config.train.caption_dropout,
            num_references=config.data.num_references,
            has_masks=config.data.has_masks,
        )

    def pieces(self, config: Config, maker: InputMaker) -> list[Piece]:
        rows = {name: self.columns[name] for name in maker.columns}
        return Piece.cut(rows, loss_shares(config.train), 1, 0, pieces_a_step(config.train, 1))


def state(engine: Flat, ema: EMA, export: Any, folder: Path) -> dict[str, torch.Tensor]:
    """What a checkpoint holds of a training."""
    from safetensors.torch import load_file

    folder.mkdir()
    export(whole(engine, ema.averages), folder)
    files = {path.name: load_file(path) for path in folder.rglob("*.safetensors")}
    found = {f"{name}/{key}": value for name, each in files.items() for key, value in each.items()}
    tensors, _ = snapshot(engine, ema.averages)
    return found | {f"state/{key}": value.clone() for key, value in tensors.items()}


def enter(engine: Flat, stages: list[Stage], step: int) -> None:
    """Begin a step, as the loop does."""
    stage = stage_at(stages, step)
    if step == stage.first:
        engine.enter_stage(stage, stages[stages.index(stage) - 1] if step > 1 else None)
    engine.set_hyperparameters(stage, step)


def alone(config: Config, rows: Rows, folder: Path) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and state of a training by itself."""
    pipeline, model = build_model(config)
    maker = rows.maker(config, pipeline, model)
    export = exporter(config, pipeline, model, 0)
    engine = build_engine(model, config.train, 1)
    assert isinstance(engine, Flat)
    ema, stages, losses = EMA(engine.averaged.items(), 0.5), stages_of(config.train, STEPS), []
    for step in range(1, STEPS + 1):
        enter(engine, stages, step)
        seed_dropout(CPU, 0, step, 0)
        pieces, share = rows.pieces(config, maker), 0.0
        for number, piece in enumerate(pieces, start=1):
            inputs, weights = maker.make(piece, step)
            share += engine.accumulate(inputs, weights, last=number == len(pieces)).item()
        losses.append(share)
        engine.update(torch.zeros(1))
        ema.update(engine.averaged.items(), step)
    return losses, state(engine, ema, export, folder)


def together(
    configs: Sequence[Config],
    rows: Rows,
    folder: Path,
    ends: Sequence[int],
    *,
    spoilt: Sequence[int] = (),
    others: Rows | None = None,
) -> list[tuple[list[float], dict[str, torch.Tensor]]]:
    """Losses and states of trainings in one pack; each leaves it after its last step.

    Args:
        spoilt: those whose weights are no numbers.
        others: rows of the trainings from the second on, if they are not those of the first.
    """
    pipeline, pack = build_pack(configs)
    members = list(pack.members.values())
    makers = [rows.maker(c, pipeline, member) for c, member in zip(configs, members, strict=True)]
    exports = [exporter(c, pipeline, member, 0) for c, member in zip(configs, members, strict=True)]
    engines = build_engines(pack, configs, 1)
    for number in spoilt:
        engines[number].weights.fill_(math.nan)
    averages = [EMA(engine.averaged.items(), 0.5) for engine in engines]
    stages = [stages_of(config.train, STEPS) for config in configs]
    folds = [0, *[1] * (len(configs) - 1)] if others else []
    inputs, losses = PackedInputs(makers, folds), [list[float]() for _ in configs]
    for step in range(1, max(ends) + 1):
        active = [number for number, end in enumerate(ends) if step <= end]
        for number in active:
            enter(engines[number], stages[number], step)
        streams = {0: rows, 1: others} if others else {0: rows}
        of_streams = [each.pieces(configs[0], makers[0]) for each in streams.values()]
        begun = [
            inputs.begin(dict(zip(streams, pieces, strict=True)), step)
            for pieces in zip(*of_streams, strict=True)
        ]
        shares = accumulate(pack, engines, inputs, begun, active, step=step, rank=0)
        for number, share in zip(active, shares, strict=True):
            losses[number].append(share.item())
            engines[number].update(torch.zeros(1))
            averages[number].update(engines[number].averaged.items(), step)
    return [
        (losses[number], state(engines[number], averages[number], exports[number], folder / str(number)))
        for number in range(len(configs))
    ]


def assert_alike(
    base: Path, folder: Path, common: Settings, members: Sequence[Settings], data: Settings | None = None
) -> None:
    """Members of a pack, of which the first one leaves it early, end as they do alone."""
    folder.mkdir()
    rows = Rows(base)
    configs = [configured(base, folder, data, **{**common, **own}) for own in members]
    ends = [STEPS - 1, *[STEPS] * (len(configs) - 1)]
    packed = together(configs, rows, folder, ends)
    for number, (config, (losses, found)) in enumerate(zip(configs, packed, strict=True)):
        if ends[number] < STEPS:
            continue
        expected_losses, expected = alone(config, rows, folder / f"alone {number}")
        torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected_losses), rtol=1e-5, atol=1e-6)
        assert found.keys() == expected.keys()
        moved = 0.0
        for name, value in expected.items():
            if "exp_avg" in name:
                continue  # compared by what they do to the weights
            apart = (found[name] - value).abs().max().item()
            moved = max(moved, value.abs().max().item())
            assert apart < 1e-5, f"{name}: {apart}"
        assert moved > 0


OF_OTHER_ROWS = {
    ".experts.": ("HiDreamImagePipeline", "w1"),  # see the tokens that their gate gives them
    # Of a timestep more, that of pictures to edit.
    "timestep_embedder": ("QwenImage21Pipeline", "linear_1"),
    "modulation": ("QwenImage21Pipeline", "modulation.1"),
    "norm_out": ("QwenImage21Pipeline", "norm_out.linear"),
}


@pytest.mark.parametrize("layer", OF_OTHER_ROWS)
def test_a_layer_that_does_not_see_the_rows_of_the_batch_is_refused(
    layer: str, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    family, target = OF_OTHER_ROWS[layer]
    base = tiny(family)
    targets = {"lora": {"target_modules": ["to_q", target]}}
    configs = [configured(base, tmp_path, learning_rate=rate, **targets) for rate in (1e-3, 2e-3)]
    refused = r"^train\.lora\.target_modules: \S*" + re.escape(layer) + r".* set search\.pack: off"
    with pytest.raises(ValueError, match=refused):
        together(configs, Rows(base), tmp_path, [1, 1])
    searched = searching(configs[0])
    with pytest.raises(ValueError, match=refused):
        check_rows(searched)
    decided, line = with_pack(searched, Model(searched), [])
    assert decided.trials_together == 1
    assert re.match(r"search\.pack: each trial has its own workers: train\.lora\.target_modules: \S*", line)
    by_number = searched.model_copy(update={"search": searched.search.model_copy(update={"pack": 2})})
    with pytest.raises(ConfigError, match=refused):
        with_pack(by_number, Model(by_number), [])


def searching(config: Config) -> Config:
    """A search of two such trials together."""
    search = config.search.model_copy(update={"learning_rates": [1e-3, 2e-3], "pack": "auto"})
    return config.model_copy(update={"search": search})


@pytest.mark.parametrize("family", ["StableDiffusionXLPipeline", "Krea2Pipeline", "ZImagePipeline"])
def test_layers_that_see_the_rows_of_the_batch_pass_the_check(
    family: str, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    config = configured(tiny(family), tmp_path, lora={"target_modules": ["to_q", "to_k", "to_out.0"]})
    check_rows(searching(config))
    special = {"dropout": 0.1, "use_dora": True}
    lora = config.train.lora.model_copy(update=special)
    check_rows(config.model_copy(update={"train": config.train.model_copy(update={"lora": lora})}))


@pytest.mark.parametrize("model", FAMILY_MODELS)
def test_members_of_a_pack_end_as_they_do_alone(
    model: str, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    """With adapters in all linear layers but those whose rows are not the batch's."""
    base = tiny(model)
    family, pipeline = check_settings(configured(base, tmp_path, method="full"))
    layers = {
        name
        for part in family.denoisers
        for name, layer in getattr(pipeline, part).named_modules()
        if isinstance(layer, nn.Linear)
        and not any(other in name for other, (of, _) in OF_OTHER_ROWS.items() if model == of)
    }
    targets = {"target_modules": sorted(layers)}
    members = [
        {"learning_rate": 2e-3, "lora": targets},
        {"learning_rate": 1e-3, "lora": targets | {"rank": 2, "alpha": 4}, "ema_decay": 0.9},
        {"learning_rate": 5e-3, "lora": targets | {"rank": 8, "use_rslora": True}, "max_grad_norm": 0.1},
    ]
    assert_alike(base, tmp_path / "runs", {}, members)


def test_members_see_references_and_masks_as_they_do_alone(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    base, members = (
        tiny("FluxKontextPipeline"),
        [{"loss": {"outside_mask": share}} for share in (0.0, 0.1, 0.5)],
    )
    assert_alike(base, tmp_path / "runs", {}, members, EDITS)
    rows, plain = Rows(base), configured(base, tmp_path / "plain")
    config = configured(base, tmp_path / "edits", EDITS)
    losses = [alone(each, rows, tmp_path / each.storage)[0] for each in (plain, config)]
    assert losses[0][0] != losses[1][0]


CASES: dict[str, tuple[Settings, list[Settings]]] = {
    "dora, beside a plain adapter": (
        {},
        [{"learning_rate": 1e-3}, {"lora": {"use_dora": True}}, {"lora": {"rank": 2, "use_dora": True}}],
    ),
    "dropout": (
        {},
        [{"learning_rate": 1e-3}, {"lora": {"dropout": 0.1}}, {"lora": {"dropout": 0.5, "rank": 2}}],
    ),
    "dropout, dora, recomputed": (
        {"gradient_checkpointing": True, "lora": {"dropout": 0.3, "use_dora": True}},
        [{"learning_rate": 1e-3}, {"learning_rate": 2e-3}],
    ),
    "other layers, and convolutions": (
        {},
        [
            {"learning_rate": 1e-3},
            {"lora": {"target_modules": ["to_q", "conv1", "conv2"]}},
            {"lora": {"target_modules": ["to_k", "conv1"], "use_dora": True}},
        ],
    ),
    "losses, schedules, captions": (
        {},
        [
            {"learning_rate": 1e-3},
            {"loss": {"min_snr_gamma": 5, "offset_noise": 0.1}, "caption_dropout": 0.0},
            {
                "loss": {"input_perturbation": 0.1, "huber_delta": 0.1, "zero_terminal_snr": True},
                "schedule": "cosine",
                "weight_decay": 0.5,
                "betas": [0.5, 0.9],
            },
        ],
    ),
    "pieces, channels last": (
        {"micro_batch_size": 2, "channels_last": True},
        [{"learning_rate": 1e-3}, {"learning_rate": 2e-3}],
    ),
    "text encoder": (
        {"train_text_encoder": True},
        [{"learning_rate": 1e-3}, {"learning_rate": 2e-3, "lora": {"rank": 2}}],
    ),
    "groups and stages": (
        {"groups": {"down": ["*down_blocks*"]}},
        [
            {"learning_rate": 1e-3},
            {"trainable": ["down"]},
            {"stages": [{"steps": 1, "trainable": ["down"]}, {"steps": 2, "learning_rate": 1e-3}]},
        ],
    ),
    # A rounded gradient that is nearly 0 may have another sign, so Lion and Muon take small steps here.
    "optimizers": (
        {"learning_rate": 1e-3},
        [
            {"weight_decay": 0.1},
            {"stages": [{"steps": 1, "optimizer": "lion", "learning_rate": 4e-6}, {"steps": 2}]},
            {"stages": [{"steps": 1, "optimizer": "muon", "learning_rate": 4e-6}, {"steps": 2}]},
        ],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_members_may_differ_in(case: str, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    common, members = CASES[case]
    assert_alike(tiny("StableDiffusionPipeline"), tmp_path / "runs", common, members)


def test_folds_have_rows_of_their_own(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    base = tiny("StableDiffusionPipeline")
    rows, others = Rows(base), Rows(base, seed=1)
    configs = [configured(base, tmp_path, micro_batch_size=2, lora={"rank": 2}) for _ in range(3)]
    packed = together(configs, rows, tmp_path, [STEPS] * 3, others=others)
    for number, (losses, found) in enumerate(packed):
        expected_losses, expected = alone(
            configs[number], others if number else rows, tmp_path / f"alone {number}"
        )
        torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected_losses), rtol=1e-5, atol=1e-6)
        for name, value in expected.items():
            if "exp_avg" not in name:
                assert (found[name] - value).abs().max() < 1e-5, name
    assert packed[0][0] != packed[1][0] == packed[2][0]


def test_a_member_whose_loss_is_not_a_number_spoils_no_other(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    base = tiny("StableDiffusionPipeline")
    configs = [configured(base, tmp_path, learning_rate=rate) for rate in (2e-3, 1e-3)]
    rows = Rows(base)
    [(spoilt, _), (losses, found)] = together(configs, rows, tmp_path, [STEPS, STEPS], spoilt=[0])
    expected_losses, expected = alone(configs[1], rows, tmp_path / "alone")
    assert all(math.isnan(loss) for loss in spoilt)
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    assert all((found[name] - value).abs().max() < 1e-5 for name, value in expected.items())
