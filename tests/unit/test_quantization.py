"""Adapters on a base that is stored in 4 or 8 bits: the numbers, and the way from training to serving."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ray_jobs.config import Config, ConfigError, load_config
from ray_jobs.diffusion import quantization
from ray_jobs.diffusion.ema import EMA
from ray_jobs.diffusion.families import family_of
from ray_jobs.diffusion.quantization import FORMATS, NF4, QuantizedLinear, quantize
from ray_jobs.diffusion.sampling import sample_pictures
from ray_jobs.planning.footprint import footprint
from ray_jobs.training.batch import InputMaker, Piece, loss_shares
from ray_jobs.training.engine import Engine
from ray_jobs.training.phases import stages_of
from ray_jobs.training.setup import build_engine, build_model, check_settings, exporter
from ray_jobs.training.state import Shards, load_state, load_weights, snapshot, whole, write_shard
from ray_jobs.training.trainer import depends_on
from ray_jobs.weights.encoders import Encoders
from ray_jobs.weights.loading import load_lora, load_pipeline
from serving.engine.adapters import read_adapter
from serving.engine.engine import Engine as ServingEngine
from serving.engine.optimizations import prepare
from serving.request import Request
from tests.tiny_models import FAMILY_MODELS, half_painted
from tests.unit.test_affects import DATA

DEMO = Path(__file__).parents[2] / "configs" / "demo.yaml"
CPU = torch.device("cpu")
UNET, TRANSFORMER = "StableDiffusionPipeline", "FluxPipeline"
PROMPT = "a small red circle"
# Root mean square error of normal weights, as a share of their own: what 4 bits by quantiles, 8 bits evenly
# up to the largest of a row, and 3 bits of mantissa give.
ERRORS = {"nf4": (0.088, 0.095), "int8": (0.006, 0.010), "fp8": (0.024, 0.028)}
formats = pytest.mark.parametrize("format_name", FORMATS)


def config(base: Path, *overrides: str) -> Config:
    plain = ["train.lora.target_modules=null", "train.num_workers=1", "train.batch_size=4"]
    return load_config(DEMO, [f"model.base={base}", "data.resolution=64", *plain, *overrides])


def layer_of(format_name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Linear, QuantizedLinear]:
    torch.manual_seed(0)
    plain = nn.Linear(1000, 60).requires_grad_(False)  # 60,000 weights: the last block of 64 is not full
    nn.init.normal_(plain.weight, std=0.02)
    return plain, QuantizedLinear(plain, format_name).to(dtype)


@formats
def test_normal_weights_are_rounded_as_finely_as_the_format_says(format_name: str) -> None:
    plain, quantized = layer_of(format_name)
    error = torch.linalg.norm(quantized.weight - plain.weight) / torch.linalg.norm(plain.weight)
    least, most = ERRORS[format_name]
    assert least < error < most


@formats
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_computes_exactly_what_a_plain_one_with_its_restored_weight_does(
    format_name: str, dtype: torch.dtype
) -> None:
    _, quantized = layer_of(format_name, dtype)
    assert quantized.weight.dtype == dtype
    ours = torch.randn(2, 5, 1000, dtype=dtype, requires_grad=True)
    theirs = ours.detach().clone().requires_grad_()
    output, expected = quantized(ours), F.linear(theirs, quantized.weight, quantized.bias)
    assert torch.equal(output, expected)
    for each in (output, expected):
        each.float().square().sum().backward()
    assert ours.grad is not None and theirs.grad is not None
    assert torch.equal(ours.grad, theirs.grad)


@formats
def test_autograd_keeps_no_restored_weight(format_name: str) -> None:
    _, quantized = layer_of(format_name)
    kept: list[torch.Tensor] = []
    inputs = torch.randn(1, 1000, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor), lambda none: none):
        quantized(inputs)
    assert {each.dtype for each in kept} <= {torch.uint8, torch.int8, torch.int32}


@formats
def test_casts_and_zeros_leave_what_is_stored_as_it_is(format_name: str) -> None:
    plain = nn.Linear(64, 2).requires_grad_(False)
    nn.init.zeros_(plain.weight[1])
    quantized = QuantizedLinear(plain, format_name)
    before = quantized.weight
    assert before[0].any() and not before[1].any() and before.isfinite().all()
    assert torch.equal(quantized.bfloat16().float().weight, before)


def test_nf4_has_the_bytes_that_bitsandbytes_gave() -> None:
    stored, scales = NF4().store(torch.linspace(-1, 1, 64).pow(3).mul(0.05)[None])
    expected = "001112223344455566666777777777777777777777788888999aabbccddeeeff"  # of 0.50.2
    assert bytes(stored.flatten().tolist()).hex() == expected and scales[0] == torch.tensor(0.05)


def test_nf4_has_the_bytes_and_the_values_of_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    weight = torch.randn(50, 70, generator=torch.Generator().manual_seed(0)).div(50)
    stored, scales = NF4().store(weight)
    theirs, state = bitsandbytes.functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    assert torch.equal(stored.flatten()[: len(theirs)], theirs.flatten())
    assert torch.equal(scales[: len(stored)], state.absmax)
    for dtype in (torch.float32, torch.bfloat16):
        fast = NF4().restore(stored, scales, weight.shape, dtype)
        with monkeypatch.context() as patched:
            patched.setattr(quantization, "_kernel", lambda: None)
            assert torch.equal(NF4().restore(stored, scales, weight.shape, dtype), fast)
    assert torch.equal(
        fast.float(), bitsandbytes.functional.dequantize_4bit(theirs, state).bfloat16().float()
    )


def test_a_component_without_linear_layers_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.quantize: Sequential has no linear layers; leave it out"):
        quantize(nn.Sequential(nn.Conv2d(1, 1, 1)), "nf4")


class Training:
    """Steps on four captions and pictures, as the loop takes them, without Ray."""

    def __init__(self, config: Config, *, restored: bool = False) -> None:
        """
        Args:
            restored: train on plain layers with the restored weights instead.
        """
        self.config, train = config, config.train
        self.pipeline, self.model = build_model(config)
        if restored:
            restore(self.model)
        encoders = Encoders(config.model.base)
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randint(0, 256, (4, 64, 64, 3), dtype=torch.uint8, generator=generator).numpy()
        mean, logvar = encoders.encode_pictures(pixels)
        captions = encoders.encode_captions([PROMPT, "a blue cross", "", "a green square"])
        empty = encoders.encode_captions([""])
        self.maker = InputMaker(self.pipeline.vae, self.model, empty, CPU, seed=0, caption_dropout=0.1)
        sizes = torch.tensor([[64, 64, 0, 0, 64, 64]] * 4, dtype=torch.int32)
        rows = {"latents_mean": mean, "latents_logvar": logvar, "conditioning": sizes, **captions}
        rows |= encoders.encode_masked(half_painted(pixels))
        self.rows = {name: rows[name] for name in self.maker.columns}
        self.export = exporter(config, self.pipeline, self.model, 0)
        [self.stage] = stages_of(train, 1000)
        self.engine: Engine
        self.ema: EMA

    def start(self, resumed: Path | None = None) -> None:
        if resumed:
            shards = Shards(resumed, 1)
            load_weights(shards, self.model.trained())
        self.engine = build_engine(self.model, self.config.train, 1)
        self.ema = EMA(list(self.engine.averaged.items()), 0.5)
        if resumed:
            load_state(shards, self.engine)
            for piece in self.engine.owned:
                stored = shards.read("ema", piece.name, piece.start, piece.numel)
                self.engine.average(self.ema.averages, piece).copy_(stored)

    def run(self, first: int, last: int) -> list[float]:
        """Return the loss of each step."""
        losses = []
        for step in range(first, last + 1):
            [piece] = Piece.cut(self.rows, loss_shares(self.config.train), 1, 0, 1)
            inputs, weights = self.maker.make(piece, step)
            self.engine.set_hyperparameters(self.stage, 100)
            losses.append(self.engine.accumulate(inputs, weights, last=True).item())
            self.engine.update(torch.zeros(1))
            self.ema.update(list(self.engine.averaged.items()), step)
        return losses

    def write(self, folder: Path) -> Path:
        write_shard(folder, 0, 1, *snapshot(self.engine, self.ema.averages))
        return folder

    def weights(self, folder: Path) -> Path:
        folder.mkdir()
        self.export(whole(self.engine, self.ema.averages), folder)
        return folder


def restore(module: nn.Module) -> None:
    """Replace quantized layers by plain ones with the restored weights."""
    for name, layer in list(module.named_modules()):
        if isinstance(layer, QuantizedLinear):
            plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
            plain.weight, plain.bias = nn.Parameter(layer.restored()), layer.bias
            owner, _, own = name.rpartition(".")
            setattr(module.get_submodule(owner), own, plain.requires_grad_(False))


@pytest.fixture(params=[UNET, TRANSFORMER])
def base(request: pytest.FixtureRequest, tiny: Callable[[str], Path]) -> Path:
    return tiny(request.param)


def pixels(pipeline: Any) -> torch.Tensor:
    """Draw a picture as the evaluator does."""
    [drawn] = sample_pictures(
        pipeline, [PROMPT], [7], shapes=[(64, 64)], num_steps=3, guidance_scale=2.0, batch_size=1
    )
    return drawn[0]


def served(engine: ServingEngine, *adapters: str | None) -> list[torch.Tensor]:
    """Draw the same picture with each adapter, all in one batch."""
    size: dict[str, Any] = {"height": 64, "width": 64}
    futures = [engine.submit(Request(PROMPT, 7, 3, 2.0, adapter=each, **size)) for each in adapters]
    engine.drain()
    return [future.result(0).pixels for future in futures]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("format_name", "settings"),
    [
        *((format_name, ["train.precision=bf16"]) for format_name in FORMATS),
        ("nf4", ["train.gradient_checkpointing=true", "train.channels_last=true"]),
    ],
)
def test_a_training_equals_one_on_the_restored_weights_and_resumes_to_the_bit(
    format_name: str, settings: list[str], base: Path, tmp_path: Path
) -> None:
    settings = [*settings, f"model.quantize={format_name}", "train.lora.rank=4"]
    plain = Training(config(base, *settings), restored=True)
    plain.start()
    expected = plain.run(1, 4)
    training = Training(config(base, *settings))
    training.start()
    assert training.run(1, 2) == expected[:2]
    resumed = Training(config(base, *settings))
    resumed.start(training.write(tmp_path / "state"))
    assert resumed.run(3, 4) == training.run(3, 4) == expected[2:]
    ours, theirs = (snapshot(each.engine, each.ema.averages)[0] for each in (resumed, plain))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILY_MODELS)
def test_every_family_is_trained_on_a_rounded_base_as_on_its_restored_weights(
    tiny: Callable[[str], Path], name: str
) -> None:
    losses = []
    for restored in (True, False):
        settings = ["model.quantize=nf4", "train.lora.rank=4"]
        training = Training(config(tiny(name), *settings), restored=restored)
        training.start()
        losses.append(training.run(1, 2))
    assert losses[0] == losses[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("format_name", "dora"), [("nf4", True), ("nf4", False), ("int8", False), ("fp8", False)]
)
def test_what_was_trained_is_scored_and_served_on_the_quantized_base(
    format_name: str, dora: bool, base: Path, tmp_path: Path
) -> None:
    lora = ["train.lora.rank=4", f"train.lora.use_dora={str(dora).lower()}"]
    training = Training(config(base, f"model.quantize={format_name}", *lora))
    training.start()
    training.run(1, 3)
    folder = training.weights(tmp_path / "weights")

    pipeline = load_pipeline(str(base), quantization=format_name)
    bare = pixels(pipeline)
    load_lora(pipeline, folder)
    adapted = pixels(pipeline)
    assert not torch.equal(adapted, bare)
    assert torch.equal(pixels(load_pipeline(str(base), folder, quantization=format_name)), adapted)

    of_engine = load_pipeline(str(base), quantization=format_name)
    prepare(of_engine, "cpu")
    engine = ServingEngine(of_engine, adapter_folder=lambda name: folder)
    drawn = served(engine, "trained", None)
    engine.close()
    for ours, theirs in zip(drawn, (adapted, bare), strict=True):
        difference = ours.int() - theirs.permute(1, 2, 0).int()
        assert difference.abs().max() <= 1

    fused = load_pipeline(str(base), quantization=format_name)
    adapter = read_adapter("trained", folder, family_of(fused).adaptable(fused))
    with pytest.raises(ValueError, match=f"^fuse: .* is stored as {format_name}, which would round"):
        prepare(fused, "cpu", fuse=adapter)
    with pytest.raises(ValueError, match="^int8_weights: the denoiser is quantized already"):
        prepare(fused, "cpu", int8_weights=True)


@pytest.mark.slow
@formats
def test_the_plan_counts_the_bytes_that_are_there(format_name: str, base: Path) -> None:
    settings = config(base, f"model.quantize={format_name}")
    found, (_, model) = footprint(settings), build_model(settings)
    stored = [p for name, p in model.named_parameters() if name.endswith((".stored", ".scales"))]
    others = [p for name, p in model.named_parameters() if not name.endswith((".stored", ".scales"))]
    assert found.quantized_bytes == sum(parameter.nbytes for parameter in stored)
    assert found.whole("lora") - found.quantized == sum(parameter.numel() for parameter in others)
    plain = footprint(config(base))
    assert found.whole("lora") == plain.whole("lora") and found.activations == plain.activations
    check_settings(settings)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("train.method=full", r"model\.quantize: nf4 freezes the base; set train\.method: lora"),
        ("search.space={train.method: [lora, full]}", "model.quantize: nf4 freezes the base"),
        ("train.zero_stage=3", r"model\.quantize: nf4 cannot be divided .* train\.zero_stage to 2 or less"),
        ("serve.fuse_champion=true", r"would round away what serve\.fuse_champion merges"),
        ("serve.int8_weights=true", r"serve\.int8_weights changes nothing with model\.quantize: nf4"),
        ("model.quantize=nf3", r"model\.quantize: .*'nf4', 'int8' or 'fp8'"),
    ],
)
def test_what_does_not_go_with_a_quantized_base_is_refused(setting: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refusal:
        load_config(DEMO, ["model.quantize=nf4", setting])
    assert "\n" not in str(refusal.value)


def test_results_of_plain_bases_are_still_recognised_and_quantized_ones_are_others() -> None:
    plain, quantized = (depends_on(load_config(DEMO, each), DATA) for each in ([], ["model.quantize=nf4"]))
    assert "quantize" not in plain["model"]
    assert quantized["model"] == plain["model"] | {"quantize": "nf4"}


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_a_base_is_rounded_alike_whatever_it_computes_in(
    tiny_flux: Path, tmp_path: Path, variant: str | None
) -> None:
    base, expected = tiny_flux, torch.float32
    if variant:  # published in half precision only
        pipeline = load_pipeline(str(tiny_flux), dtype=torch.float16)
        pipeline.save_pretrained(tmp_path, variant=variant)
        base, expected = tmp_path, torch.float16
    plain = load_pipeline(str(base), dtype=expected).transformer
    stored = []
    for dtype in (torch.float32, torch.bfloat16):
        transformer = load_pipeline(str(base), dtype=dtype, quantization="nf4").transformer
        assert transformer.dtype == dtype
        stored.append({name: each.stored for name, each in transformer.named_modules() if is_of_nf4(each)})
    assert stored[0] and all(stored[0][name].equal(stored[1][name]) for name in stored[0])
    name, first = next(iter(stored[0].items()))
    assert first.equal(NF4().store(plain.get_submodule(name).weight)[0])


def is_of_nf4(layer: nn.Module) -> bool:
    return isinstance(layer, QuantizedLinear) and layer.format_name == "nf4"


def test_a_base_is_rounded_file_by_file_while_it_is_read(
    tiny_flux: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_pipeline(str(tiny_flux)).save_pretrained(tmp_path, max_shard_size="100KB")
    files = [str(path) for path in tmp_path.glob("transformer/*.safetensors")]
    assert len(files) > 3
    mapped: list[int] = []
    store = NF4.store

    def seen(own: NF4, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mapped.append(num_mapped(files))
        return store(own, weight)

    monkeypatch.setattr(NF4, "store", seen)
    pipeline = load_pipeline(str(tmp_path), quantization="nf4")
    assert mapped[0] > mapped[-1] and mapped == sorted(mapped, reverse=True) and mapped[-1] <= 2
    assert num_mapped(files) == 0
    expected = load_pipeline(str(tiny_flux), quantization="nf4").transformer.state_dict()
    assert all(tensor.equal(expected[name]) for name, tensor in pipeline.transformer.state_dict().items())


def num_mapped(files: list[str]) -> int:
    """Return how many files are mapped into this process's memory."""
    maps = Path("/proc/self/maps").read_text()
    return sum(file in maps for file in files)
