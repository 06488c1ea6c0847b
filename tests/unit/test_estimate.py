"""The estimates of memory, against the models themselves, ZeRO's measured bytes and autograd."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ray_jobs.config import Config, ConfigError, TrainConfig
from ray_jobs.data.feeding.order import rows_of_rank
from ray_jobs.diffusion.families import FAMILIES
from ray_jobs.planning.estimate import host_memory, rank_memory
from ray_jobs.planning.footprint import footprint
from ray_jobs.planning.memory import Model
from ray_jobs.training.engine import pieces_a_step, rows_a_worker
from ray_jobs.training.memory import state_bytes
from ray_jobs.training.setup import build_engine, build_engines, build_model, build_pack
from ray_jobs.training.zero import OVERLAPPED_AT_ONCE, gradient_buckets
from ray_jobs.weights.model_files import latent_shapes
from tests.tiny_models import FAMILY_MODELS, painted

pytestmark = pytest.mark.slow  # every test builds a model

ROOT = Path(__file__).resolve().parents[2]
BASE = ROOT / "models" / "emoji-base"
SIDE = 64


def a_config(model: Path, **train: Any) -> Config:
    return Config.model_validate(
        {
            "name": "planned",
            "data": {"source": "pictures", "resolution": SIDE},
            "model": {"base": str(model)},
            "search": {"learning_rates": [1e-3], "ladder": [2]},
            "train": train,
        }
    )


SOME = [  # of UNets and transformers, with text encoders that are trained and without, with experts
    *("StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusion3Pipeline", "FluxPipeline"),
    *("HiDreamImagePipeline", "Krea2Pipeline"),
]
TRAINED: dict[str, dict[str, Any]] = {
    "full": {"method": "full"},
    "lora": {"method": "lora"},
    "dora with text encoders": {"lora": {"rank": 4, "use_dora": True}, "train_text_encoder": True},
    "full with text encoders": {"method": "full", "train_text_encoder": True},
    "a group": {
        "method": "full",
        "groups": {"attention": ["*attn*", "*attention*"]},
        "trainable": ["attention"],
    },
}


def cases(of_all: list[str], of_some: list[str]) -> list[Any]:
    """Cases of every family, and others of some."""
    found = [(case, name) for case in of_all for name in FAMILY_MODELS]
    found += [(case, name) for case in of_some for name in SOME]
    return [pytest.param(case, name, id=f"{case}-{name}") for case, name in found]


@pytest.mark.parametrize(("case", "name"), cases(["full", "lora"], [*TRAINED][2:]))
def test_a_model_without_weights_tells_how_many_parameters_are_trained(
    tiny: Callable[[str], Path], case: str, name: str
) -> None:
    train = TRAINED[case]
    if train.get("train_text_encoder") and not FAMILIES[name].trainable_encoders:
        train = train | {"train_text_encoder": False}
    config = a_config(tiny(name), **train)
    _, model = build_model(config)
    found = footprint(config)
    assert found.trained == sum(p.numel() for _, p in model.all_trained)
    assert found.whole(config.train.method) == sum(p.numel() for p in model.parameters())
    assert found.activations > 0


# MiB of parameters, gradients and the optimizer's states on each of two workers, as
# `python -m benchmarks.train zero` measured them (docs/training.md).
MEASURED = {
    "lora": {0: 77.7, 1: 69.2, 2: 69.2, 3: 43.2},
    "full": {0: 170.8, 1: 129.9, 2: 129.9, 3: 106.7},
}


@pytest.mark.parametrize("method", MEASURED)
@pytest.mark.parametrize("stage", range(4))
def test_a_ranks_bytes_are_the_measured_ones_to_two_percent(method: str, stage: int) -> None:
    lora = {"rank": 32, "alpha": 32, "target_modules": DEMO_TARGETS}
    config = a_config(BASE, method=method, lora=lora, zero_stage=stage, num_workers=2, engine="deepspeed")
    found = Model(config).memory(config.train).device
    assert found.kept / 2**20 == pytest.approx(MEASURED[method][stage], rel=0.02)


@pytest.mark.parametrize(
    ("method", "precision", "optimizer"),
    [
        *((method, precision, "adamw") for method in ("lora", "full") for precision in ("fp32", "bf16")),
        *(("lora", "fp32", optimizer) for optimizer in ("adafactor", "muon", "prodigy")),
    ],
)
def test_the_bytes_of_the_flat_engine_are_those_that_it_keeps(
    method: str, precision: str, optimizer: str
) -> None:
    lora = {"rank": 32, "alpha": 32, "target_modules": DEMO_TARGETS}
    own = {"method": method, "lora": lora, "precision": precision, "optimizer": optimizer}
    config = a_config(BASE, **own, num_workers=1, engine="flat")
    found = Model(config).memory(config.train).device
    _, model = build_model(config)
    for kind, size in state_bytes(build_engine(model, config.train, 1)).items():
        assert getattr(found, kind) == pytest.approx(size, rel=0.02), kind


DEMO_TARGETS = [
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out"),
    *("ff.net.0.proj", "ff.net.2", "conv1", "conv2"),
]


def test_zero_divides_what_its_paper_says() -> None:
    """Table 1 of arXiv 1910.02054: 7.5 billion parameters on 64 GPUs, mixed precision; GB without buckets.

    There the gradients of several pieces are summed in 16 bits, here in 32.
    """
    expected = {1: 31.4 + 15, 2: 16.6 + 15 / 64, 3: 1.88 + 15 / 64}
    for stage, gigabytes in expected.items():
        train = TrainConfig(
            method="full",
            precision="bf16",
            engine="deepspeed",
            zero_stage=stage,
            batch_size=128,
            micro_batch_size=1,
            num_workers=64,
        )
        found = rank_memory(train, whole=7_500_000_000, trained=7_500_000_000, workers=64).device
        assert found.kept / 1e9 == pytest.approx(gigabytes, rel=0.01)


def test_what_is_offloaded_leaves_the_device_and_nothing_is_lost() -> None:
    plain = TrainConfig(zero_stage=3, precision="bf16", use_gpu=True, engine="deepspeed")
    offloading = plain.model_copy(update={"offload_optimizer": True, "offload_parameters": True})
    sizes: dict[str, Any] = {"whole": 1_000_000, "trained": 400_000, "workers": 4}
    here, found = rank_memory(plain, **sizes), rank_memory(offloading, **sizes)
    assert found.device.kept == 0
    assert found.offloaded.kept == here.device.kept
    assert found.device.whole + found.offloaded.whole == here.device.whole


def test_a_base_on_the_host_leaves_two_blocks_on_the_device_and_nothing_is_lost() -> None:
    plain = TrainConfig(precision="bf16", use_gpu=True, gradient_checkpointing=True)
    offloading = plain.model_copy(update={"offload_base": True})
    sizes: dict[str, Any] = {
        "whole": 1_000_000,
        "trained": 4_000,
        "workers": 2,
        "quantized": 8_000,
        "quantized_bytes": 4_500,
    }
    blocks: dict[str, Any] = {"blocks": 1_800_000, "two_blocks": 90_000}
    here, found = (rank_memory(train, **sizes, **blocks) for train in (plain, offloading))
    assert here.offloaded.whole == 0 and found.offloaded.whole == found.offloaded.parameters == 1_800_000
    assert found.device.whole == here.device.whole - 1_800_000 + 90_000
    hosts = [
        host_memory(train, base=996_000, trained=4_000, workers=2, blocks=1_800_000)
        for train in (plain, offloading)
    ]
    assert hosts == [2 * 996_000, 2 * 996_000 - 1_800_000]


@pytest.mark.parametrize("workers", [1, 3, 4])
@pytest.mark.parametrize("micro", [None, 2, 3])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_batches_and_sharding_are_the_engines(workers: int, micro: int | None, method: str) -> None:
    train = TrainConfig(batch_size=10, micro_batch_size=micro, num_workers=workers, method=method)
    most = max(len(rows_of_rank(10, workers, r)) for r in range(workers))
    assert rows_a_worker(train, workers) == most
    assert pieces_a_step(train, workers) == math.ceil(most / (micro or most))


def test_several_gpus_have_two_buckets_of_the_size_that_the_engine_sets() -> None:
    sizes, of_model = {"num_workers": 2, "batch_size": 4, "engine": "deepspeed"}, 200_000_000

    def buckets(**settings: Any) -> int:
        train = TrainConfig(method="full", precision="bf16", **sizes | settings)
        return rank_memory(train, whole=of_model, trained=of_model, workers=2).device.buckets

    assert buckets() == 2 * of_model
    assert buckets(use_gpu=True) == 2 * 2 * OVERLAPPED_AT_ONCE
    assert (
        buckets(use_gpu=True, zero_stage=1, micro_batch_size=1) == 4 * 2 * OVERLAPPED_AT_ONCE
    )  # sums in fp32
    gathered = 2 * of_model
    assert buckets(use_gpu=True, zero_stage=3) == 2 * OVERLAPPED_AT_ONCE + gathered
    chosen = {"zero_optimization": {"reduce_bucket_size": 3e8}}
    assert buckets(use_gpu=True, deepspeed=chosen) == 2 * 2 * 300_000_000
    train = TrainConfig(use_gpu=True, **sizes)
    assert gradient_buckets(train, 2, 1000) == (2, 1000)  # adapters: no more than they have


LORA: dict[str, dict[str, Any] | None] = {
    "full": None,
    "full, dropout": None,
    "attention": {},
    "the demo's layers": {"target_modules": DEMO_TARGETS},
    "dropout": {"dropout": 0.1},
    "dora": {"use_dora": True, "target_modules": DEMO_TARGETS},
}


@pytest.mark.parametrize(
    ("layers", "name"),
    [*cases(["full", "attention"], ["dropout", "dora"]), ("full, dropout", "FluxPipeline")],
)
def test_activations_are_what_autograd_saves(tiny: Callable[[str], Path], name: str, layers: str) -> None:
    lora = LORA[layers]
    if lora and "target_modules" in lora and not FAMILIES[name].is_unet:
        lora = lora | {"target_modules": None}
    full = {"method": "full", "dropout": 0.1 if "dropout" in layers else 0.0}
    train = full if lora is None else {"lora": {"rank": 8, "alpha": 8} | lora}
    config = a_config(tiny(name), **train)
    _, model = build_model(config)
    called: list[Any] = []
    for layer in model.denoiser.modules():
        if isinstance(layer, nn.Dropout):
            layer.register_forward_hook(lambda layer, *_: called.append(layer))
    kept = footprint(config).activations
    assert kept == pytest.approx(saved_by_autograd(model, tiny(name)), rel=1e-6)
    if lora is None:
        assert FAMILIES[name].has_dropout == bool(called), "what train.dropout would set"
    if layers == "attention":
        return  # what is recomputed is one step of all layers
    recomputing = a_config(tiny(name), gradient_checkpointing=True, **train)
    _, model = build_model(recomputing)
    # Autograd's hooks do not show the block that is recomputed, which the estimate includes.
    all_blocks = footprint(recomputing).activations
    assert saved_by_autograd(model, tiny(name)) / 1.5 < all_blocks < kept
    some = a_config(tiny(name), gradient_checkpointing=True, checkpoint_every=2, **train)
    assert all_blocks < footprint(some).activations


def saved_by_autograd(model: Any, base: Path, rows: int = 1) -> int:
    """Bytes that a real forward pass keeps, weights left out."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    family, config = model.family, model.denoiser.config
    [latents] = latent_shapes(str(base), [(SIDE, SIDE)])
    conditions = {
        name: torch.ones((rows, *shape), dtype=dtype)
        for name, (shape, dtype) in family.text.shapes(config).items()
    }
    conditions |= {name: torch.full((rows, 6), SIDE) for name in family.picture_conditions}
    conditions |= painted(family, latents, rows)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        noisy, timesteps = torch.randn(rows, *latents), torch.full((rows,), 500.0)
        output = family.denoise(model.model, noisy, timesteps, conditions)
    del output
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("layers", ["attention", "the demo's layers", "dora"])
@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "FluxPipeline"])
def test_a_packs_memory_is_what_it_keeps(tiny: Callable[[str], Path], name: str, layers: str) -> None:
    lora = LORA[layers] or {}
    if not FAMILIES[name].is_unet:
        lora = lora | {"target_modules": None}
    config = a_config(tiny(name), lora={"rank": 8, "alpha": 8} | lora, num_workers=1, batch_size=2)
    model, trials = Model(config), 3
    estimate = model.memory(config.train, trials).device
    _, pack = build_pack([config] * trials)
    pack.divide(list(pack.members), 2 * trials)
    kept = saved_by_autograd(pack.model, tiny(name), 2 * trials)
    # What DoRA keeps of weights is counted once for each row.
    assert 0.95 * kept < estimate.activations < (1.4 if layers == "dora" else 1.1) * kept
    states = [state_bytes(engine) for engine in build_engines(pack, [config] * trials, 1)]
    for kind in ("gradients", "master_weights", "moments"):
        assert getattr(estimate, kind) == pytest.approx(sum(each[kind] for each in states), rel=0.02), kind
    whole = sum(parameter.nbytes for parameter in pack.parameters())
    assert estimate.parameters == pytest.approx(whole, rel=0.02)


def test_half_precision_keeps_about_half(tiny_flux: Path) -> None:
    single, half = (footprint(a_config(tiny_flux, precision=name)).activations for name in ("fp32", "bf16"))
    assert 0.45 < half / single < 0.65


def test_adapters_for_no_layer_are_refused(tiny_model: Path) -> None:
    config = a_config(tiny_model, lora={"target_modules": ["nowhere"]})
    with pytest.raises(ConfigError, match="train.lora: unet: .*nowhere"):
        Model(config).footprint(config.train)
