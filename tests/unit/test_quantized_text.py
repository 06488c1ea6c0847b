"""`model.quantize_text`: text encoders are stored in few bits wherever captions are encoded."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ray_jobs.config import ConfigError, load_config
from ray_jobs.diffusion.families import family_of
from ray_jobs.diffusion.quantization import FORMATS, NF4, QuantizedLinear, is_quantized, quantize
from ray_jobs.diffusion.sampling import encode_prompts
from ray_jobs.planning.inference import needs
from ray_jobs.registry.models import RegisteredModel
from ray_jobs.registry.registration import quantization_tags
from ray_jobs.training.trainer import depends_on
from ray_jobs.weights.encoders import Encoders
from ray_jobs.weights.loading import load_pipeline
from ray_jobs.weights.model_files import encoders_digest
from serving.engine.engine import Engine
from serving.engine.optimizations import prepare
from serving.messages import base_of
from serving.request import Request
from tests.tiny_models import FAMILY_MODELS
from tests.unit.test_affects import DATA
from tests.unit.test_quantization import DEMO, config, restore

PROMPTS = ["a small red circle", "", "a blue cross"]
FP32, BF16 = torch.float32, torch.bfloat16
dtypes = pytest.mark.parametrize("dtype", [FP32, BF16])


def encoded(pipeline: object) -> dict[str, torch.Tensor]:
    """Return embeddings without what `Encoders` adds: tokens."""
    return encode_prompts(pipeline, PROMPTS)  # type: ignore[arg-type]


@dtypes
@pytest.mark.parametrize("model", FAMILY_MODELS)
def test_captions_are_those_of_the_same_encoders_with_restored_weights(
    tiny: Callable[[str], Path], model: str, dtype: torch.dtype
) -> None:
    base = str(tiny(model))
    plain, quantized = (
        load_pipeline(base, dtype=dtype, text_quantization=stored) for stored in (None, "nf4")
    )
    encoders = family_of(quantized).text.present(quantized)
    assert all(is_quantized(part) for part in encoders.values())
    found = encoded(quantized)
    for name, part in encoders.items():
        restored, expected = part.state_dict(), getattr(plain, name)
        for own, layer in part.named_modules():
            if isinstance(layer, QuantizedLinear):
                assert layer.weight.dtype == dtype
                expected.get_submodule(own).weight.copy_(layer.weight)
            assert not own or layer.training == expected.get_submodule(own).training
        for own, tensor in expected.state_dict().items():
            assert own not in restored or restored[own].dtype == tensor.dtype
    for name, tensor in encoded(plain).items():
        assert found[name].dtype == tensor.dtype and found[name].equal(tensor), name


@dtypes
def test_each_layer_of_a_t5_is_restored_once_a_call(
    tiny_flux: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = load_pipeline(str(tiny_flux), dtype=dtype, text_quantization="nf4")
    count, restore_nf4 = 0, NF4.restore

    def counted(*args: Any) -> torch.Tensor:
        nonlocal count
        count += 1
        return restore_nf4(*args)

    monkeypatch.setattr(NF4, "restore", counted)
    layers = [each for each in pipeline.text_encoder_2.modules() if isinstance(each, QuantizedLinear)]
    pipeline.text_encoder_2(torch.zeros((1, 8), dtype=torch.long))
    assert count == len(layers)
    [*_, last] = (each for each in layers if each.asked)
    assert last.weight.shape == last.restored().shape and last.weight.dtype == dtype
    assert (last.weight * 2).equal(last.restored() * 2)


@pytest.mark.parametrize("format_name", FORMATS)
def test_prepare_evaluators_and_replicas_have_the_same_captions(
    tiny_flux: Path, tmp_path: Path, format_name: str
) -> None:
    base = str(tiny_flux)
    plain = Encoders(base).encode_captions(PROMPTS)
    prepared = Encoders(base, text_quantization=format_name).encode_captions(PROMPTS)
    pipeline = load_pipeline(base, text_quantization=format_name)
    for name, tensor in encoded(pipeline).items():
        assert prepared[name].equal(tensor) and not plain[name].equal(tensor)
    # Also with a base that was trained whole, whose files are plain.
    load_pipeline(base).save_pretrained(tmp_path)
    whole = load_pipeline(base, tmp_path, quantization="nf4", text_quantization=format_name)
    assert not is_quantized(whole.transformer)
    for name, tensor in encoded(whole).items():
        assert prepared[name].equal(tensor)


def test_an_endpoint_draws_what_it_does_with_restored_weights(tiny_flux: Path) -> None:
    def drawn(restored: bool, **switches: str) -> torch.Tensor:
        pipeline = load_pipeline(str(tiny_flux), dtype=BF16, text_quantization="nf4")
        if restored:
            restore(pipeline.text_encoder_2)
        prepare(pipeline, "cpu", **switches)  # type: ignore[arg-type]
        engine = Engine(pipeline)
        future = engine.submit(Request(PROMPTS[0], 7, 3, 2.0, height=64, width=64))
        engine.drain()
        engine.close()
        return future.result(0).pixels

    expected = drawn(True)
    assert drawn(False).equal(expected) and drawn(False, offload="model").equal(expected)


def test_text_encoders_are_rounded_alike_whatever_they_compute_in(tiny_flux: Path) -> None:
    stored = [
        {
            name: layer.stored
            for name, layer in load_pipeline(
                str(tiny_flux), dtype=dtype, text_quantization="nf4"
            ).text_encoder_2.named_modules()
            if isinstance(layer, QuantizedLinear)
        }
        for dtype in (FP32, BF16)
    ]
    assert stored[0] and all(tensor.equal(stored[1][name]) for name, tensor in stored[0].items())


class Tied(nn.Module):
    """A language model whose output layer is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.inner = nn.Embedding(8, 64), nn.Linear(64, 64)
        self.head = nn.Linear(64, 8, bias=False)
        self.head.weight = self.embedding.weight


def test_a_layer_that_shares_an_embeddings_weight_goes_on_sharing_it() -> None:
    model = Tied().requires_grad_(False)
    quantize(model, "int8")
    assert isinstance(model.inner, QuantizedLinear)
    assert model.head.weight is model.embedding.weight


def test_the_cache_and_trainings_of_quantized_text_encoders_are_others(tiny_flux: Path) -> None:
    base = str(tiny_flux)
    digests = [encoders_digest(base), *(encoders_digest(base, text_quantization=each) for each in FORMATS)]
    assert len(set(digests)) == 4
    plain, quantized = (
        depends_on(load_config(DEMO, each), DATA)["model"] for each in ([], ["model.quantize_text=nf4"])
    )
    assert "quantize_text" not in plain and quantized == plain | {"quantize_text": "nf4"}


@pytest.mark.parametrize(
    "setting", ["train.train_text_encoder=true", "search.space={train.train_text_encoder: [true, false]}"]
)
def test_what_is_frozen_cannot_be_trained(setting: str) -> None:
    message = r"model\.quantize_text: fp8 freezes the text encoders; turn off train\.train_text_encoder"
    with pytest.raises(ConfigError, match=message) as refusal:
        load_config(DEMO, ["model.quantize_text=fp8", setting])
    assert "\n" not in str(refusal.value)


def test_an_endpoint_serves_versions_of_one_way_to_store_the_base() -> None:
    model = load_config(DEMO, ["model.quantize_text=int8"]).model
    assert quantization_tags(model) == {"base_text_quantization": "int8"}
    assert not quantization_tags(load_config(DEMO, []).model)
    plain = RegisteredModel("m", 1, "weights", "digest", "nowhere/base", None, "lora", {})
    quantized = replace(plain, text_quantization="int8")
    assert base_of(plain) != base_of(quantized)
    assert str(base_of(quantized)).endswith("base (plain, text encoders int8)")


def test_the_plan_counts_text_encoders_as_they_are_stored(tiny_flux: Path) -> None:
    settings = config(tiny_flux, "model.quantize_text=nf4")
    pipeline = load_pipeline(str(tiny_flux), text_quantization="nf4")
    parts = {name: each for name, each in pipeline.components.items() if isinstance(each, nn.Module)}
    sizes = {name: sum(each.nbytes for each in part.parameters()) for name, part in parts.items()}
    encoder, evaluator, replica = needs(settings)
    assert encoder.weights == sum(sizes.values()) - sizes["transformer"]
    assert evaluator.weights == replica.weights == sum(sizes.values())
    assert encoder.weights < needs(config(tiny_flux))[0].weights
