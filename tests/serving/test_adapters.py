"""Rows of different adapters share a batch, and each is the picture of diffusers with that adapter alone."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ray_jobs.diffusion.families import family_of
from ray_jobs.diffusion.finetuning import FineTuning, add_lora
from ray_jobs.diffusion.objectives import LossSettings
from ray_jobs.weights.loading import LORA_WEIGHTS, load_lora, load_pipeline
from ray_jobs.weights.saving import save_lora
from serving.engine.adapters import read_adapter
from serving.engine.engine import Engine
from serving.request import Request, alone
from tests.serving import plain_diffusers
from tests.tiny_models import FAMILY_MODELS

TOLERANCE = 0.55  # of a pixel's 255 levels, as in test_engine.py

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
VARIANTS: dict[str, dict[str, Any]] = {
    "attention": {"rank": 4, "alpha": 4, "target_modules": ATTENTION},
    "scaled": {"rank": 2, "alpha": 5, "target_modules": ["to_q", "to_v"]},
    "rslora": {"rank": 3, "alpha": 2, "target_modules": ["to_k"], "use_rslora": True},
    "dora": {"rank": 2, "alpha": 3, "target_modules": ["to_q", "to_out.0"], "use_dora": True},
    "convolutions": {
        "rank": 2,
        "alpha": 2,
        "target_modules": ["conv1", "conv_shortcut", "downsamplers.0.conv"],
    },
    "dora of convolutions": {"rank": 2, "alpha": 3, "target_modules": ["conv2"], "use_dora": True},
    "text": {"rank": 2, "alpha": 2, "target_modules": ["to_q"], "text": ["q_proj", "fc1"]},
}


def write_adapter(model: Path, folder: Path, seed: int, **options: Any) -> Path:
    """An adapter with random weights, as publish writes it."""
    torch.manual_seed(seed)
    pipeline = load_pipeline(str(model))
    family = family_of(pipeline)
    text = options.pop("text", None)
    parts = {family.denoiser: options["target_modules"]}
    parts |= dict.fromkeys(family.trainable_encoders, text) if text else {}
    for name, targets in parts.items():
        part = getattr(pipeline, name)
        add_lora(part, dropout=0.0, **{**options, "target_modules": targets})
        for key, parameter in part.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(parameter, std=0.3)
            if "lora_magnitude" in key:
                parameter.data *= 1 + 0.3 * torch.rand(parameter.shape)
    objective = family.schedule.objective(pipeline.scheduler.config)
    tuned = FineTuning(pipeline, family, objective, LossSettings(), text_encoders_trained=bool(text))
    folder.mkdir(parents=True)
    save_lora(pipeline, tuned, dict(tuned.trained()), folder)
    return folder


def write_variants(base: Path, root: Path) -> dict[str, Path]:
    """An adapter of each variant, by its name."""
    return {
        name: write_adapter(base, root / name, seed, **options)
        for seed, (name, options) in enumerate(VARIANTS.items())
    }


@pytest.fixture(scope="module")
def adapters(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One of each variant for the tiny Stable Diffusion."""
    return write_variants(tiny_model, tmp_path_factory.mktemp("adapters"))


def parts_of(pipeline: Any) -> dict[str, Any]:
    return family_of(pipeline).adaptable(pipeline)


@pytest.mark.parametrize("num_cores", [None, 2])
def test_a_batch_mixes_adapters_of_every_kind_and_rows_without(
    tiny_model: Path, adapters: dict[str, Path], num_cores: int | None
) -> None:
    engine = Engine(
        load_pipeline(str(tiny_model)),
        max_rows=16,
        adapter_folder=adapters.__getitem__,
        num_cores=num_cores,
    )
    requests = [
        Request("a small red circle", 5, 2 + place % 3, 1.0 + 2 * (place % 2), adapter=name)
        for place, name in enumerate([None, *adapters, "text"])
    ]
    futures = [engine.submit(request) for request in requests]
    engine.drain()
    unchanged = futures[0].result(0).pixels
    for request, future in zip(requests, futures, strict=True):
        plain = plain_diffusers.load(tiny_model)
        if request.adapter:
            load_lora(plain, adapters[request.adapter])
            assert (future.result(0).pixels.float() - unchanged.float()).abs().max() > 2, request
        expected = plain_diffusers.draw(plain, request)
        assert (future.result(0).pixels - expected).abs().max() <= TOLERANCE, request


@pytest.mark.parametrize("model", [name for name in FAMILY_MODELS if name != "StableDiffusionPipeline"])
def test_every_family_mixes_adapters_of_its_denoiser_and_text_encoders(
    tiny: Callable[[str], Path], tmp_path: Path, model: str
) -> None:
    folder = tiny(model)
    names = ["attention", "text"]
    for seed, name in enumerate(names):
        write_adapter(folder, tmp_path / name, seed, **VARIANTS[name])
    engine = Engine(load_pipeline(str(folder)), adapter_folder=lambda name: tmp_path / name)
    asked = plain_diffusers.understood(
        engine.pipeline, Request("a small red circle", 5, 2, 3.0, None, 64, 64)
    )
    requests = [replace(asked, adapter=name) for name in [*names, None]]
    futures = [engine.submit(request) for request in requests]
    engine.drain()
    for request, future in zip(requests, futures, strict=True):
        plain = plain_diffusers.load(folder)
        if request.adapter:
            load_lora(plain, tmp_path / request.adapter)
        expected = plain_diffusers.draw(plain, request)
        assert (future.result(0).pixels - expected).abs().max() <= TOLERANCE, request


def test_an_adapter_without_settings_in_its_file_has_the_scale_of_diffusers(
    tiny_model: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    save_file(load_file(adapters["scaled"] / LORA_WEIGHTS), tmp_path / LORA_WEIGHTS)
    request = Request("a small red circle", 5, 2, 3.0, adapter="bare")
    engine = Engine(load_pipeline(str(tiny_model)), adapter_folder=lambda _: tmp_path)
    future = engine.submit(request)
    engine.drain()
    plain = plain_diffusers.load(tiny_model)
    load_lora(plain, tmp_path)
    assert (future.result(0).pixels - plain_diffusers.draw(plain, request)).abs().max() <= TOLERANCE


def test_adapters_are_kept_up_to_their_bytes_least_recently_used_first_to_go(
    tiny_model: Path, adapters: dict[str, Path]
) -> None:
    pipeline = load_pipeline(str(tiny_model))
    size = read_adapter("attention", adapters["attention"], parts_of(pipeline)).num_bytes
    read: list[str] = []

    def folder(name: str) -> Path:
        read.append(name)
        return adapters["attention"]

    engine = Engine(pipeline, adapter_folder=folder, adapter_bytes=2 * size)
    for name in ["a", "b", "a", "c", "a", "b"]:
        engine.submit(Request("a", 0, 1, 1.0, adapter=name))
        engine.drain()
        assert engine.load().adapter_bytes <= 2 * size
    assert read == ["a", "b", "c", "b"]


def test_an_adapter_whose_client_has_gone_counts_among_the_kept(
    tiny_model: Path, adapters: dict[str, Path]
) -> None:
    pipeline = load_pipeline(str(tiny_model))
    size = read_adapter("attention", adapters["attention"], parts_of(pipeline)).num_bytes
    engine = Engine(pipeline, adapter_folder=lambda _: adapters["attention"], adapter_bytes=int(1.5 * size))
    assert engine.adapters is not None
    for name in ("left", "asked"):
        future = engine.submit(Request("a", 0, 1, 1.0, adapter=name))
        engine.step()
        if reading := engine.adapters._loading.get(alone(name)):  # not yet read
            reading.result(60)
        if name == "left":
            future.cancel()
    engine.drain()
    assert future.result(0)
    assert not engine.adapters._loading
    assert engine.load().adapter_bytes == size


def test_adapters_that_are_read_keep_no_row_waiting_whose_own_is_there(
    tiny_model: Path, adapters: dict[str, Path]
) -> None:
    import threading

    arrived = threading.Event()

    def folder(name: str) -> Path:
        assert name == "hot" or arrived.wait(60)  # a slow store
        return adapters["attention"]

    engine = Engine(load_pipeline(str(tiny_model)), max_rows=2, adapter_folder=folder)
    engine.submit(Request("a", 0, 1, 1.0, adapter="hot"))
    engine.drain()
    cold = [engine.submit(Request("a", 0, 1, 1.0, adapter=f"cold {number}")) for number in range(4)]
    hot = engine.submit(Request("a", 0, 1, 1.0, adapter="hot"))
    engine.step()
    assert hot.result(0) and not any(each.done() for each in cold)
    arrived.set()
    engine.drain()
    assert all(each.result(0) for each in cold)


def test_an_adapter_larger_than_all_may_be_is_refused(tiny_model: Path, adapters: dict[str, Path]) -> None:
    engine = Engine(load_pipeline(str(tiny_model)), adapter_folder=adapters.__getitem__, adapter_bytes=1000)
    future = engine.submit(Request("a", 0, 1, 1.0, adapter="attention"))
    engine.drain()
    with pytest.raises(ValueError, match="adapter: 'attention' takes .* more than the 1,000"):
        future.result(0)


def test_a_row_keeps_its_adapter_when_the_cache_drops_it(tiny_model: Path, adapters: dict[str, Path]) -> None:
    pipeline = load_pipeline(str(tiny_model))
    size = read_adapter("attention", adapters["attention"], parts_of(pipeline)).num_bytes
    engine = Engine(
        pipeline, adapter_folder=lambda name: adapters[name.rstrip("2")], adapter_bytes=int(1.5 * size)
    )
    futures = [engine.submit(Request("a", 0, 4, 1.0, adapter=name)) for name in ("attention", "attention2")]
    engine.drain()
    first, second = (future.result(0).pixels.int() for future in futures)
    assert (first - second).abs().max() <= 1


def test_rows_step_while_an_adapter_is_read_and_a_later_request_passes(
    tiny_model: Path, adapters: dict[str, Path]
) -> None:
    import threading

    arrived = threading.Event()

    def folder(name: str) -> Path:
        assert arrived.wait(60)  # a slow store
        return adapters[name]

    engine = Engine(load_pipeline(str(tiny_model)), max_rows=1, adapter_folder=folder)
    slow = engine.submit(Request("a", 0, 2, 1.0, adapter="attention"))
    others = [engine.submit(Request("a", seed, 2, 1.0)) for seed in range(2)]
    for _ in range(2):
        engine.step()
    assert others[0].done() and not slow.done()
    arrived.set()
    assert engine.adapters is not None
    engine.adapters._loading[alone("attention")].result(60)
    engine.step()  # its place is the next that is free: now, before the other that waits
    assert not others[1].done() and engine.load().running == 1
    engine.drain()
    assert slow.result(0) and others[1].result(0)


def test_an_adapter_that_cannot_be_read_fails_its_own_request_only(
    tiny_model: Path, adapters: dict[str, Path]
) -> None:
    engine = Engine(load_pipeline(str(tiny_model)), adapter_folder=adapters.__getitem__)
    lost = engine.submit(Request("a", 0, 2, 1.0, adapter="unknown"))
    beside = engine.submit(Request("a", 0, 2, 1.0, adapter="scaled"))
    engine.drain()
    with pytest.raises(KeyError, match="unknown"):
        lost.result(0)
    assert beside.result(0).pixels.shape == (64, 64, 3)


def renamed(old: str, new: str) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda tensors: {key.replace(old, new): tensor for key, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (renamed("to_q", "to_elsewhere"), "has no layer .*to_elsewhere; it was trained on another base"),
        (renamed("lora_A.weight", "lora.down.weight"), "is not read here.* save it again in peft's names"),
        (renamed("unet.", "transformer."), "is not read here"),
        (lambda tensors: dict(list(tensors.items())[1:]), "belong together, and one is missing"),
        (lambda tensors: {key: t[..., :-1] for key, t in tensors.items()}, "its shape does not fit the base"),
    ],
)
def test_a_file_that_is_not_covered_is_refused(
    tiny_model: Path,
    adapters: dict[str, Path],
    tmp_path: Path,
    change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]],
    told: str,
) -> None:
    tensors = change(load_file(adapters["scaled"] / LORA_WEIGHTS))
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, tmp_path / LORA_WEIGHTS)
    with pytest.raises(ValueError, match=told):
        read_adapter("other", tmp_path, parts_of(load_pipeline(str(tiny_model))))


def test_a_pickled_file_is_not_read(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / LORA_WEIGHTS).write_bytes(b"\x80\x04\x95 a pickle, whatever its name says")
    with pytest.raises(ValueError, match="not a safetensors file"):
        read_adapter("pickled", tmp_path, parts_of(load_pipeline(str(tiny_model))))
