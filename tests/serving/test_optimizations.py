"""Each switch draws nearly the pictures of float32, with adapters or a clear refusal."""

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from ray_jobs.diffusion.families import family_of
from ray_jobs.diffusion.host_weights import Block, Fetched, HostWeights
from ray_jobs.diffusion.precision import PRECISIONS
from ray_jobs.weights.loading import load_lora, load_pipeline
from serving.engine.adapters import read_adapter
from serving.engine.engine import Engine
from serving.engine.optimizations import prepare
from serving.request import Request, alone
from tests.serving import plain_diffusers
from tests.serving.plain_diffusers import draw, load
from tests.serving.test_adapters import VARIANTS, parts_of, write_adapter
from tests.tiny_models import FAMILY_MODELS

LIMITS = {"bf16": 8.0, "fp16": 1.5, "int8": 4.0, "channels_last": 0.1}
"""Mean difference to float32's pictures, of 255 levels. The tiny model has random weights, and guidance and
its autoencoder enlarge what changes."""

REQUESTS = [
    Request("a small red circle", 0, 5, 3.0, height=64, width=64),
    Request("a big blue cross", 7, 4, 1.0, height=64, width=64),
    Request("a big blue cross", 7, 3, 2.0, height=32, width=64),
]
OTHERS = [name for name in FAMILY_MODELS if name != "StableDiffusionPipeline"]
SWITCHES: dict[str, dict[str, Any]] = {
    "bf16": {"precision": "bf16"},
    "fp16": {"precision": "fp16"},
    "int8": {"int8_weights": True},
    "channels_last": {"channels_last": True},
}


@pytest.fixture(scope="module")
def adapters(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    names = ("attention", "dora", "dora of convolutions", "text")
    return {name: write_adapter(tiny_model, root / name, 3, **VARIANTS[name]) for name in names}


def drawn(pipeline: Any, *requests: Request, **options: Any) -> list[torch.Tensor]:
    """Pictures of requests; adapters are read before, since their time decides which rows share a batch."""
    engine = Engine(pipeline, **options)
    for name in dict.fromkeys(request.adapter for request in requests if request.adapter):
        assert engine.adapters is not None
        assert engine.adapters.get(alone(name)) or engine.adapters._loading[alone(name)].result(60)
    futures = [engine.submit(plain_diffusers.understood(pipeline, request)) for request in requests]
    engine.drain()
    return [future.result(0).pixels.float() for future in futures]


def differences(ours: list[torch.Tensor], expected: list[torch.Tensor]) -> list[float]:
    return [float((a - b).abs().mean()) for a, b in zip(ours, expected, strict=True)]


def prepared(folder: Path, precision: str = "fp32", **switches: Any) -> Any:
    pipeline = load_pipeline(str(folder), dtype=PRECISIONS[precision])
    prepare(pipeline, "cpu", **switches)
    return pipeline


@pytest.mark.parametrize("switch", SWITCHES)
def test_a_switch_keeps_the_pictures_with_and_without_adapters(
    tiny_model: Path, adapters: dict[str, Path], switch: str
) -> None:
    requests = [*REQUESTS, *(Request("a small red circle", 2, 3, 3.0, adapter=name) for name in adapters)]
    options: dict[str, Any] = {"adapter_folder": adapters.__getitem__}
    expected = drawn(load_pipeline(str(tiny_model)), *requests, **options)
    ours = drawn(prepared(tiny_model, **SWITCHES[switch]), *requests, **options)
    assert max(differences(ours, expected)) <= LIMITS[switch]
    assert switch == "channels_last" or max(differences(ours, expected)) > 0
    assert min(differences(expected[3:], expected[:1] * len(adapters))) > LIMITS[switch]


@pytest.mark.parametrize("model", OTHERS)
def test_every_family_can_be_of_half_precision_and_int8(tiny: Callable[[str], Path], model: str) -> None:
    folder = tiny(model)
    pipeline = prepared(folder, precision="bf16", int8_weights=True)
    expected = drawn(load_pipeline(str(folder)), REQUESTS[0])
    assert max(differences(drawn(pipeline, REQUESTS[0]), expected)) <= LIMITS["bf16"] + LIMITS["int8"]
    denoiser = getattr(pipeline, family_of(pipeline).denoiser)
    assert denoiser.dtype == torch.bfloat16


def aligned(pipeline: Any) -> Any:
    """Give weights memory of their own, as a device does: how a CPU rounds depends on where they begin."""
    for part in pipeline.components.values():
        for weight in part.parameters() if isinstance(part, torch.nn.Module) else ():
            weight.data = weight.data.clone()
    return pipeline


class Copies:
    """What `HostWeights` copies to the device: the layers' weights, and the most bytes there at a time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.weights: set[int] = set()
        self.most = self.largest = 0
        self._alive: list[tuple[StorageWeakRef, int]] = []
        fetch = HostWeights._fetch

        def counted(kept: HostWeights, block: Block) -> Fetched:
            fetched = fetch(kept, block)
            self.weights |= {id(weight.host) for weight in block.weights}
            self._alive += [
                (StorageWeakRef(each.untyped_storage()), each.nbytes) for each in fetched.segments
            ]
            self._alive = [(storage, size) for storage, size in self._alive if not storage.expired()]
            self.most = max(self.most, sum(size for _, size in self._alive))
            self.largest = max(self.largest, block.num_bytes)
            return fetched

        monkeypatch.setattr(HostWeights, "_fetch", counted)


@pytest.mark.parametrize("part", ["encoders", "model"])
@pytest.mark.parametrize("switches", [{}, {"precision": "bf16"}, {"int8_weights": True}])
def test_an_offloaded_model_draws_the_same_and_no_more_is_on_the_device_than_its_largest_layer(
    tiny_model: Path,
    adapters: dict[str, Path],
    part: str,
    switches: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    image = torch.zeros((64, 64, 3), dtype=torch.uint8)
    requests = [
        *REQUESTS,
        Request("", 3, 5, 3.0, image=image, strength=0.7, height=64, width=64),
        *(Request("a small red circle", 2, 3, 3.0, adapter=name) for name in adapters),
    ]
    options: dict[str, Any] = {"adapter_folder": adapters.__getitem__}
    expected = drawn(prepared(tiny_model, **switches), *requests, **options)
    pipeline, copies = prepared(tiny_model, offload=part, **switches), Copies(monkeypatch)
    # A level here and there: two cores share a batch.
    assert max(differences(drawn(pipeline, *requests, num_cores=2, **options), expected)) < 0.01
    assert 0 < copies.most <= copies.largest
    away = {pipeline.text_encoder, pipeline.vae} | ({pipeline.unet} if part == "model" else set())
    for component in (pipeline.text_encoder, pipeline.vae, pipeline.unet):
        matrices = {id(each) for each in component.parameters() if each.ndim > 1}
        assert copies.weights >= matrices if component in away else not copies.weights & matrices


@pytest.mark.parametrize("model", OTHERS)
def test_every_family_can_be_offloaded(tiny: Callable[[str], Path], model: str) -> None:
    folder = tiny(model)
    expected = drawn(aligned(load_pipeline(str(folder))), REQUESTS[0])
    assert differences(drawn(prepared(folder, offload="model"), REQUESTS[0]), expected) == [0]


def test_offloaded_engines_in_one_process_leave_each_others_weights_alone(tiny_model: Path) -> None:
    expected = drawn(aligned(load_pipeline(str(tiny_model))), *REQUESTS)
    engines = [Engine(prepared(tiny_model, offload="model")) for _ in range(2)]
    futures = [[engine.submit(request) for request in REQUESTS] for engine in engines]
    while any(engine.unfinished for engine in engines):
        for engine in engines:
            engine.step()
    for ours in futures:
        assert differences([each.result(0).pixels.float() for each in ours], expected) == [0] * len(REQUESTS)


def test_a_closed_engine_gives_its_weights_in_host_memory_back(tiny_model: Path) -> None:
    engine = Engine(prepared(tiny_model, offload="model"))
    weights = weakref.ref(engine.pipeline.unet.conv_in.weight)
    engine.submit(REQUESTS[0])
    engine.drain()
    engine.close()
    del engine
    gc.collect()
    assert weights() is None


def test_an_offloaded_model_keeps_deep_features(tiny_model: Path) -> None:
    expected = drawn(aligned(load_pipeline(str(tiny_model))), *REQUESTS, cache_features=True)
    ours = drawn(prepared(tiny_model, offload="model"), *REQUESTS, cache_features=True)
    assert max(differences(ours, expected)) == 0


def test_a_compiled_denoiser_is_not_offloaded(tiny_model: Path) -> None:
    with pytest.raises(ValueError, match="^offload: a compiled denoiser"):
        prepared(tiny_model, offload="model", compile=True)


@pytest.mark.parametrize("kernel", ["flash", "math"])
def test_an_attention_kernel_changes_no_picture(tiny_model: Path, kernel: Any) -> None:
    expected = drawn(load_pipeline(str(tiny_model)), *REQUESTS)
    ours = drawn(load_pipeline(str(tiny_model)), *REQUESTS, attention=kernel)
    assert max(float((a - b).abs().max()) for a, b in zip(ours, expected, strict=True)) <= 1


def test_an_attention_kernel_that_the_device_lacks_is_an_error_and_no_other_kernel(tiny_model: Path) -> None:
    engine = Engine(load_pipeline(str(tiny_model)), attention="cudnn")
    future = engine.submit(REQUESTS[0])
    engine.drain()
    with pytest.raises(RuntimeError, match="[Nn]o (available kernel|viable backend)"):
        future.result(0)


def test_int8_weights_are_stored_as_such_and_at_most_half_a_level_off(tiny_model: Path) -> None:
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    plain = load_pipeline(str(tiny_model)).unet.get_submodule(name)
    layer = prepared(tiny_model, int8_weights=True).unet.get_submodule(name)
    level = plain.weight.abs().amax(dim=1, keepdim=True) / 127
    assert ((layer.weight - plain.weight).abs() <= 0.5001 * level).all()
    stored = {each.dtype: each.numel() for each in (layer.stored, layer.scales)}
    # The scales are stored as bits: as float32 they would decide what diffusers calls a model's dtype.
    assert stored == {torch.int8: plain.weight.numel(), torch.int32: len(plain.weight)}


@pytest.mark.parametrize("name", ["attention", "dora", "dora of convolutions", "text"])
def test_a_fused_adapter_draws_what_it_draws_for_a_row(
    tiny_model: Path, adapters: dict[str, Path], name: str
) -> None:
    request = Request("a small red circle", 2, 3, 3.0, adapter=name)
    expected = drawn(load_pipeline(str(tiny_model)), request, adapter_folder=adapters.__getitem__)
    pipeline = load_pipeline(str(tiny_model))
    prepare(pipeline, "cpu", fuse=read_adapter(name, adapters[name], parts_of(pipeline)))
    ours = drawn(pipeline, Request("a small red circle", 2, 3, 3.0))
    assert (ours[0] - expected[0]).abs().max() <= 1


def test_a_fused_model_serves_no_other_adapter(tiny_model: Path, adapters: dict[str, Path]) -> None:
    pipeline = load_pipeline(str(tiny_model))
    prepare(pipeline, "cpu", fuse=read_adapter("dora", adapters["dora"], parts_of(pipeline)))
    with pytest.raises(ValueError, match="^fuse: .* cannot serve others"):
        Engine(pipeline, adapter_folder=adapters.__getitem__)


@pytest.mark.parametrize("options", [{"adapter_folder": Path}, {"cache_features": True}])
def test_a_compiled_model_has_no_hooks(tiny_model: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="^compile: incompatible with (adapters|cache_features)"):
        Engine(prepared(tiny_model, compile=True), **options)


def test_a_transformer_has_no_channels_last_and_no_deep_features(tiny_flux: Path) -> None:
    with pytest.raises(ValueError, match="channels_last: FluxTransformer2DModel"):
        prepared(tiny_flux, channels_last=True)
    with pytest.raises(ValueError, match="cache_features: only a UNet"):
        Engine(load_pipeline(str(tiny_flux)), cache_features=True)


@pytest.mark.parametrize("switch", ["int8_weights", "compile"])
def test_a_model_with_an_adapter_of_peft_in_it_is_refused(
    tiny_model: Path, adapters: dict[str, Path], switch: str
) -> None:
    pipeline = load_pipeline(str(tiny_model))
    load_lora(pipeline, adapters["attention"])
    with pytest.raises(ValueError, match=f"{switch}: the denoiser contains a peft adapter"):
        prepare(pipeline, "cpu", int8_weights=switch == "int8_weights", compile=switch == "compile")


def test_a_model_with_a_scheduler_that_cannot_be_served_is_drawn_by_eulers(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    """As published: HiDream-I1 Full has UniPC for flows, which the engine does not step."""
    from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

    folder = tmp_path / "published"
    pipeline = load(tiny("HiDreamImagePipeline"))
    pipeline.scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    pipeline.save_pretrained(folder)
    with pytest.raises(ValueError, match="set serve.solver to euler"):
        drawn(prepared(folder), REQUESTS[0])
    plain = load(folder)
    plain.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    [ours] = drawn(prepared(folder, solver="euler"), REQUESTS[0])
    assert float((ours - draw(plain, REQUESTS[0])).abs().max()) <= 1  # the engine rounds to whole levels
