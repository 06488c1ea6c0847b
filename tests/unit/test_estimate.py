"""The estimates of memory, against the models themselves, ZeRO's measured bytes and autograd."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from ray_jobs.config import Config, ConfigError, TrainConfig
from ray_jobs.data.feeding.order import rows_of_rank
from ray_jobs.planning.activations import activation_bytes
from ray_jobs.planning.estimate import (
    Shapes,
    effective_stage,
    numel,
    parameter_shapes,
    pieces_a_step,
    rank_memory,
    rows_a_worker,
    trained_shapes,
)
from ray_jobs.training import engine
from ray_jobs.training.setup import build_model
from tests import tiny_models

ROOT = Path(__file__).resolve().parents[2]
BASE = ROOT / "models" / "emoji-base"
CAPTION_TOKENS, PICTURES, SIDE = 16, 8, 8
BUILDERS = {
    "Stable Diffusion XL": tiny_models.tiny_stable_diffusion_xl,
    "Stable Diffusion 3": tiny_models.tiny_stable_diffusion_3,
    "FLUX": tiny_models.tiny_flux,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small model of each family."""
    built = {name: build(tmp_path_factory.mktemp("model")) for name, build in BUILDERS.items()}
    return {"Stable Diffusion": BASE} | built


def a_config(model: Path, **train: Any) -> Config:
    return Config.model_validate(
        {
            "name": "planned",
            "data": {"source": "pictures"},
            "model": {"base": str(model)},
            "search": {"learning_rates": [1e-3], "ladder": [2]},
            "train": train,
        }
    )


def shapes_of(model: Path) -> tuple[Shapes, dict[str, Shapes]]:
    """The denoiser's, and those of the CLIP text encoders."""
    name = "unet" if (model / "unet").is_dir() else "transformer"
    encoders = {}
    for folder in sorted(model.glob("text_encoder*")):
        if "CLIP" in json.loads((folder / "config.json").read_text())["architectures"][0]:
            encoders[folder.name] = parameter_shapes(folder)
    return parameter_shapes(model / name), encoders


@pytest.mark.parametrize("name", ["Stable Diffusion", *BUILDERS])
@pytest.mark.parametrize(
    "train",
    [
        {"method": "full"},
        {"method": "lora"},
        {"method": "lora", "lora": {"rank": 4, "use_dora": True}, "train_text_encoder": True},
        {"method": "full", "train_text_encoder": True},
        {"method": "full", "groups": {"attention": ["*attn*"]}, "trainable": ["attention"]},
    ],
    ids=["full", "lora", "dora with text encoders", "full with text encoders", "a group"],
)
def test_the_files_headers_tell_how_many_parameters_are_trained(
    models: dict[str, Path], name: str, train: dict[str, Any]
) -> None:
    config = a_config(models[name], **train)
    _, model = build_model(config)
    denoiser, encoders = shapes_of(models[name])
    found = trained_shapes(config.train, denoiser, encoders if config.train.train_text_encoder else {})
    assert sum(map(numel, found.values())) == sum(p.numel() for _, p in model.all_trained)


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
    config = a_config(BASE, method=method, lora=lora, zero_stage=stage).train
    denoiser, _ = shapes_of(BASE)
    trained = sum(map(numel, trained_shapes(config, denoiser, {}).values()))
    whole = sum(map(numel, denoiser.values())) + (trained if method == "lora" else 0)
    found = rank_memory(config, whole=whole, trained=trained, workers=2).device
    assert found.kept / 2**20 == pytest.approx(MEASURED[method][stage], rel=0.02)


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
            zero_stage=stage,
            batch_size=128,
            micro_batch_size=1,
            num_workers=64,
        )
        found = rank_memory(train, whole=7_500_000_000, trained=7_500_000_000, workers=64).device
        assert found.kept / 1e9 == pytest.approx(gigabytes, rel=0.01)


def test_what_is_offloaded_leaves_the_device_and_nothing_is_lost() -> None:
    plain = TrainConfig(zero_stage=3, precision="bf16", use_gpu=True)
    offloading = plain.model_copy(update={"offload_optimizer": True, "offload_parameters": True})
    sizes = {"whole": 1_000_000, "trained": 400_000, "workers": 4}
    here, found = rank_memory(plain, **sizes), rank_memory(offloading, **sizes)
    assert found.device.kept == 0
    assert found.offloaded.kept == here.device.kept
    assert found.device.whole + found.offloaded.whole == here.device.whole


@pytest.mark.parametrize("workers", [1, 3, 4])
@pytest.mark.parametrize("micro", [None, 2, 3])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_batches_and_sharding_are_the_engines(workers: int, micro: int | None, method: str) -> None:
    train = TrainConfig(batch_size=10, micro_batch_size=micro, num_workers=workers, method=method)
    assert rows_a_worker(train, workers) == max(len(rows_of_rank(10, workers, r)) for r in range(workers))
    assert pieces_a_step(train, workers) == engine.pieces_a_step(train, workers)
    assert effective_stage(train, workers) == engine.sharded_for(train, workers).zero_stage


LORA: dict[str, dict[str, Any] | None] = {
    "full": None,
    "attention": {},
    "the demo's layers": {"target_modules": DEMO_TARGETS},
    "dropout": {"dropout": 0.1},
    "dora": {"use_dora": True, "target_modules": DEMO_TARGETS},
}


@pytest.mark.parametrize("name", ["Stable Diffusion", *BUILDERS])
@pytest.mark.parametrize("layers", LORA)
def test_activations_are_what_autograd_saves_to_a_tenth_below_and_a_quarter_above(
    models: dict[str, Path], name: str, layers: str
) -> None:
    def estimated(config: Config) -> int:
        return activation_bytes(
            config.train, denoiser, settings, side=SIDE, text_tokens=CAPTION_TOKENS, rows=PICTURES
        )

    lora = LORA[layers]
    train = {"method": "full"} if lora is None else {"lora": {"rank": 8, "alpha": 8} | lora}
    config = a_config(models[name], **train)
    _, model = build_model(config)
    denoiser, _ = shapes_of(models[name])
    settings = json.loads((models[name] / model.family.denoiser / "config.json").read_text())
    found = estimated(config)
    assert 0.9 < found / saved_by_autograd(model) < 1.25
    recomputing = a_config(models[name], gradient_checkpointing=True, **train)
    _, model = build_model(recomputing)
    # Autograd does not tell the one block that is computed anew, which the estimate has too.
    assert saved_by_autograd(model) / 1.5 < estimated(recomputing) < found


def saved_by_autograd(model: Any) -> int:
    """Bytes that a forward pass of the denoiser keeps, weights left out."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model.family.denoise(model.denoiser, **inputs(model))
        loss = output.square().mean()
    del loss
    return sum(storage.nbytes() for storage in kept.values())


def inputs(model: Any) -> dict[str, Any]:
    settings, family = model.denoiser.config, model.family
    width = settings.cross_attention_dim if family.denoiser == "unet" else settings.joint_attention_dim
    captions = {"prompt_embeds": torch.randn(PICTURES, CAPTION_TOKENS, width)}
    pooled = tiny_models.POOLED_2 if family.sizes else settings.get("pooled_projection_dim")
    if pooled:
        captions["pooled_prompt_embeds"] = torch.randn(PICTURES, pooled)
    channels = 4 if family.denoiser == "transformer" else settings.in_channels
    return {
        "latents": torch.randn(PICTURES, channels, SIDE, SIDE),
        "timesteps": torch.full((PICTURES,), 5),
        "captions": captions,
        "sizes": torch.full((PICTURES, 6), 64) if family.sizes else None,
        "guidance": torch.ones(PICTURES) if family.distilled_guidance(model.denoiser) else None,
    }


def test_a_file_that_is_no_safetensors_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", 5) + b"oh no")
    with pytest.raises(ConfigError, match="model.base: .*model.safetensors: not a safetensors file"):
        parameter_shapes(tmp_path)


def test_adapters_for_no_layer_are_refused() -> None:
    train = TrainConfig.model_validate({"lora": {"target_modules": ["nowhere"]}})
    with pytest.raises(ConfigError, match="train.lora.target_modules: .*nowhere.* match no layer"):
        trained_shapes(train, {"attn.to_q.weight": (4, 4)}, {})
