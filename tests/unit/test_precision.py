"""Precisions: their defaults, what is loaded in them, and how little pictures and encodings change."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ray_jobs.config import Config, Effect
from ray_jobs.diffusion.families import family_of
from ray_jobs.diffusion.precision import dtype_of, to_precision
from ray_jobs.diffusion.sampling import sample_pictures
from ray_jobs.training.setup import build_model
from ray_jobs.weights.encoders import Encoders
from ray_jobs.weights.loading import load_pipeline
from tests.tiny_models import FAMILY_MODELS, guidance

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
LIMIT = 8.0
"""Mean difference of bf16's pictures, of 255 levels: random weights, guidance and autoencoder enlarge it."""


def a_config(**sections: dict[str, Any]) -> Config:
    tree: dict[str, dict[str, Any]] = {
        "data": {"source": "pictures"},
        "model": {"base": "model"},
        "search": {"learning_rates": [1e-3], "ladder": [2]},
    }
    for name, section in sections.items():
        tree[name] = tree.get(name, {}) | section
    return Config.model_validate({"name": "checked", **tree})


def dtypes(part: nn.Module) -> set[torch.dtype]:
    return {each.dtype for each in part.parameters()}


def test_a_section_calculates_in_bf16_on_a_gpu_unless_told() -> None:
    config = a_config(train={"use_gpu": True}, serve={"use_gpu": True, "precision": "fp16"})
    assert (config.train.precision, config.data.encode_precision) == ("bf16", "bf16")
    assert (config.evaluate.precision, config.serve.precision) == ("fp32", "fp16")
    assert a_config(evaluate={"use_gpu": True}).evaluate.precision == "bf16"
    told = a_config(train={"use_gpu": True}, data={"encode_precision": "fp32"})
    assert told.data.encode_precision == "fp32"
    assert a_config().data.encode_precision == a_config().train.precision == "fp32"


def test_a_written_configuration_keeps_its_precisions() -> None:
    config = a_config(train={"use_gpu": True}, evaluate={"use_gpu": True})
    assert Config.model_validate(config.model_dump(mode="json")) == config
    assert config.with_settings({"train.learning_rate": 1e-4}).train.precision == "bf16"


def test_only_another_precision_than_that_of_earlier_releases_is_in_the_digests() -> None:
    config = a_config(train={"use_gpu": True}, evaluate={"use_gpu": True})
    assert config.evaluate.affecting(Effect.SCORES)["precision"] == "bf16"
    assert config.data.affecting(Effect.ENCODINGS)["encode_precision"] == "bf16"
    assert "precision" not in a_config().evaluate.affecting(Effect.SCORES)
    assert "encode_precision" not in a_config().data.affecting(Effect.ENCODINGS)


@pytest.mark.parametrize("model", FAMILY_MODELS)
def test_a_pipeline_is_loaded_in_its_precision(tiny: Callable[[str], Path], model: str) -> None:
    family, pipeline = family_of(model.partition("-")[0]), load_pipeline(str(tiny(model)), dtype=BF16)
    encoders = family.text.present(pipeline).values()
    for part in (*family.model(pipeline).values(), *encoders):
        keeps = bool(getattr(part, "_keep_in_fp32_modules", None))  # some layers, as its class says
        assert {BF16} <= dtypes(part) <= ({BF16, FP32} if keeps else {BF16})
    kept = pipeline.vae.config.get("force_upcast")
    assert dtypes(pipeline.vae) == {FP32 if kept else BF16}


@pytest.mark.parametrize("model", FAMILY_MODELS)
def test_the_dtype_of_a_denoiser_is_told_without_a_walk_through_its_modules(
    tiny: Callable[[str], Path], model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = load_pipeline(str(tiny(model)))
    for part in family_of(pipeline).model(pipeline).values():
        assert dtype_of(part) == part.dtype == FP32
        to_precision(part, BF16)
        assert part.dtype == BF16
        with monkeypatch.context() as patched:
            patched.setattr(type(part), "named_parameters", None)
            patched.setattr(type(part), "named_modules", None)
            assert dtype_of(part) == BF16
        assert dtype_of(deepcopy(part).to(FP32)) == FP32 and dtype_of(part) == BF16


def test_only_the_denoiser_is_fp16(tiny_model: Path) -> None:
    pipeline = load_pipeline(str(tiny_model), dtype=FP16)
    assert dtypes(pipeline.unet) == {FP16}
    assert dtypes(pipeline.text_encoder) == dtypes(pipeline.vae) == {FP32}


@pytest.mark.parametrize("model", FAMILY_MODELS)
def test_bf16_draws_nearly_the_same_pictures(tiny: Callable[[str], Path], model: str) -> None:
    def drawn(dtype: torch.dtype) -> torch.Tensor:
        pipeline = load_pipeline(str(tiny(model)), dtype=dtype)
        [pictures] = sample_pictures(
            pipeline,
            ["a small red circle", "a blue cross"],
            [1, 2],
            shapes=[(64, 64)] * 2,
            num_steps=4,
            guidance_scale=guidance(pipeline, 2.0),
            batch_size=2,
        )
        return pictures.float()

    single, half = drawn(FP32), drawn(BF16)
    assert 0 < (single - half).abs().mean() <= LIMIT


@pytest.mark.parametrize("model", FAMILY_MODELS)
def test_bf16_encodes_nearly_the_same(tiny: Callable[[str], Path], model: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)

    def encoded(dtype: torch.dtype) -> dict[str, torch.Tensor]:
        encoders = Encoders(str(tiny(model)), dtype=dtype)
        mean, _ = encoders.encode_pictures(pixels)
        return {"mean": mean, **encoders.encode_captions(["a red circle", ""])}

    single, half = encoded(FP32), encoded(BF16)
    for name, tensor in single.items():
        assert half[name].dtype == tensor.dtype
        if tensor.is_floating_point():
            assert (half[name] - tensor).abs().max() <= 0.1 * tensor.abs().max(), name
        else:
            assert half[name].equal(tensor), name


@pytest.mark.parametrize(("method", "expected"), [("lora", BF16), ("full", FP32)])
def test_a_frozen_base_is_loaded_as_it_is_used_and_trained_weights_exactly(
    tiny_model: Path, method: str, expected: torch.dtype
) -> None:
    config = a_config(model={"base": str(tiny_model)}, train={"method": method, "precision": "bf16"})
    _, model = build_model(config)
    assert dtypes(model.denoiser) == {expected}


class KeepsNorms(nn.Module):
    _keep_in_fp32_modules = ("norm",)

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(4), nn.Linear(4, 4)


def test_what_a_model_keeps_in_fp32_is_not_cast() -> None:
    model, exact = KeepsNorms().requires_grad_(False), torch.rand(4)
    model.norm.weight.data.copy_(exact)
    to_precision(nn.ModuleList([model]), BF16)
    assert model.norm.weight.equal(exact)
    assert dtypes(model.linear) == {BF16}
