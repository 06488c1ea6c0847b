"""An assistant adapter computes with the model while it trains, and is no part of what comes out."""

import json
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file

from cluster.storage import Storage
from ray_jobs.config import Config, ConfigError, load_config
from ray_jobs.diffusion.ema import EMA
from ray_jobs.diffusion.families import family_of
from ray_jobs.diffusion.sampling import sample_pictures
from ray_jobs.planning.checks import check_stages
from ray_jobs.planning.footprint import footprint
from ray_jobs.run.folder import RunFolder
from ray_jobs.training.setup import build_engine, build_model
from ray_jobs.training.state import whole
from ray_jobs.training.trainer import began_with, require_same
from ray_jobs.tuning.results import FINISHED, finished, read_result, search_digests
from ray_jobs.weights.loading import LORA_WEIGHTS, load_pipeline
from tests.unit.test_affects import BEST, DATA
from tests.unit.test_quantization import DEMO, PROMPT, Training

SHORT = ["train.num_workers=1", "train.batch_size=4", "train.lora.rank=4", "data.resolution=64"]
PLAIN = [*SHORT, "train.lora.target_modules=null", "evaluate.guidance_scale=1.0", "train.learning_rate=0.01"]
Z_IMAGE, SCHNELL, PIXART = "ZImagePipeline", "FluxPipeline-schnell", "PixArtSigmaPipeline"
RANK = 3
STEPS = 3


def config(base: Path, *overrides: str) -> Config:
    return load_config(DEMO, [f"model.base={base}", *PLAIN, *overrides])


def assistant_of(base: Path, folder: Path, prefix: str = "transformer") -> Path:
    """A LoRA of all linear layers of a base's blocks, also of those that get no adapter by default."""
    pipeline = load_pipeline(str(base))
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for name, layer in pipeline.transformer.named_modules():
        if isinstance(layer, torch.nn.Linear) and ("blocks" in name or name.startswith("layers.")):
            for side, shape in {"A": (RANK, layer.in_features), "B": (layer.out_features, RANK)}.items():
                tensors[f"{prefix}.{name}.lora_{side}.weight"] = 0.3 * torch.randn(shape, generator=generator)
    folder.mkdir()
    save_file(tensors, folder / "adapter.safetensors")
    return folder / "adapter.safetensors"


@pytest.fixture(params=[Z_IMAGE, SCHNELL, PIXART])
def base(request: pytest.FixtureRequest, tiny: Callable[[str], Path]) -> Path:
    return tiny(request.param)


@pytest.fixture
def assistant(base: Path, tmp_path: Path) -> Path:
    """As ai-toolkit writes them for Z-Image: with its own prefix."""
    prefix = "diffusion_model" if base.name == Z_IMAGE else "transformer"
    return assistant_of(base, tmp_path / "assistant", prefix)


def fused(base: Path, assistant: Path, folder: Path) -> Path:
    """The base with its assistant merged by diffusers, or by hand where diffusers has no loader."""
    pipeline = diffusers.DiffusionPipeline.from_pretrained(base)
    if family_of(pipeline).has_lora_loader:
        pipeline.load_lora_weights(assistant.parent, weight_name=assistant.name)
        pipeline.fuse_lora()
        pipeline.unload_lora_weights()
    else:
        tensors = load_file(assistant)
        with torch.no_grad():
            for name in tensors:
                if "lora_A" in name:
                    layer = name.partition(".")[2].partition(".lora_")[0]
                    update = tensors[name.replace("lora_A", "lora_B")] @ tensors[name]
                    pipeline.transformer.get_submodule(layer).weight.add_(update)
    pipeline.save_pretrained(folder)
    return folder


def trained(config: Config) -> tuple[Training, list[float]]:
    training = Training(config)
    training.start()
    return training, training.run(1, STEPS)


@pytest.mark.slow
def test_it_computes_as_the_base_that_diffusers_fuses_it_into(
    base: Path, assistant: Path, tmp_path: Path
) -> None:
    training, losses = trained(config(base, f"model.assistant={assistant}"))
    other, expected = trained(config(fused(base, assistant, tmp_path / "fused")))
    assert losses == pytest.approx(expected, rel=1e-5)
    for (name, ours), (_, theirs) in zip(training.model.trained(), other.model.trained(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5, msg=name)
    _, without = trained(config(base))
    assert without != pytest.approx(losses, rel=1e-4)


def drawn(pipeline: Any) -> torch.Tensor:
    [batch] = sample_pictures(
        pipeline, [PROMPT], [7], shapes=[(64, 64)], num_steps=2, guidance_scale=1.0, batch_size=1
    )
    return batch[0]


@pytest.mark.slow
def test_it_is_in_nothing_that_comes_out(base: Path, assistant: Path, tmp_path: Path) -> None:
    training, _ = trained(config(base, f"model.assistant={assistant}"))
    folder = training.weights(tmp_path / "weights")
    plain, _ = trained(config(base))
    other = load_file(plain.weights(tmp_path / "plain") / LORA_WEIGHTS)
    stored = load_file(folder / LORA_WEIGHTS)
    assert stored.keys() == other.keys() and all(stored[name].shape == other[name].shape for name in stored)
    assert any(not torch.equal(stored[name], other[name]) for name in stored)
    # The base with what was trained: the module that was trained, with its assistant off.
    for layer in training.model.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.set_adapter("default")
    for name, average in whole(training.engine, training.ema.averages).items():
        dict(training.model.named_parameters())[name].data.copy_(average)
    loaded: Any = load_pipeline(str(base), folder)
    x = drawn(loaded)
    loaded.transformer = training.model.denoiser.eval()
    assert torch.equal(drawn(loaded), x) and not torch.equal(x, drawn(load_pipeline(str(base))))


@pytest.mark.slow
@pytest.mark.parametrize("settings", [[], ["train.precision=bf16", "model.quantize=nf4"]])
def test_a_training_is_resumed_to_the_bit(
    tiny: Callable[[str], Path], settings: list[str], tmp_path: Path
) -> None:
    base = tiny(Z_IMAGE)
    options = [f"model.assistant={assistant_of(base, tmp_path / 'assistant')}", *settings]
    training = Training(config(base, *options))
    training.start()
    training.run(1, 2)
    state = training.write(tmp_path / "state")
    assert not any("assistant" in name for name, _ in training.model.all_trained)
    resumed = Training(config(base, *options))
    resumed.start(state)
    assert resumed.run(3, 4) == training.run(3, 4)


def losses_by_engine(base: Path, assistant: Path, adapter: Path, folder: Path) -> dict[str, list[float]]:
    """The losses of each engine, in a process of its own."""
    os.environ["LOCAL_RANK"] = "0"  # DeepSpeed asks for it; Ray Train sets it
    torch.distributed.init_process_group("gloo", f"file://{folder}/rendezvous", rank=0, world_size=1)
    found = {}
    for engine, stage in (("flat", 0), ("deepspeed", 1), ("deepspeed", 3)):
        options = [f"train.engine={engine}", f"train.zero_stage={stage}", f"model.adapter={adapter}"]
        training = Training(config(base, f"model.assistant={assistant}", *options))
        training.engine = build_engine(training.model, training.config.train, 1)
        training.ema = EMA(list(training.engine.averaged.items()), 0.5)
        found[f"{engine} {stage}"] = training.run(1, STEPS)
    return found


@pytest.mark.slow
def test_every_engine_computes_with_it_and_with_an_adapter_that_is_trained_further(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    base = tiny(Z_IMAGE)
    assistant, adapter = (assistant_of(base, tmp_path / name) for name in ("assistant", "adapter"))
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        found = pool.submit(losses_by_engine, base, assistant, adapter, tmp_path).result()
    for engine, losses in found.items():
        assert losses == pytest.approx(found["flat 0"], rel=1e-5), engine


@pytest.mark.slow
def test_dora_scales_the_base_alone(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """What is trained adds the same with the assistant as without it."""
    base = tiny(Z_IMAGE)
    assistant = assistant_of(base, tmp_path / "assistant")
    training, _ = trained(config(base, f"model.assistant={assistant}", "train.lora.use_dora=true"))
    layer: Any = training.model.denoiser.get_submodule("layers.0.attention.to_q")
    x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(0))
    outputs = {}
    for active in (["default", "assistant"], ["default"], ["assistant"], []):
        layer.set_adapter(active)
        outputs[tuple(active)] = layer(x).detach()
    both = outputs["default",] + outputs["assistant",] - outputs[()]
    torch.testing.assert_close(outputs["default", "assistant"], both, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(outputs["default",], outputs[()], atol=1e-4)


def test_the_plan_counts_it_and_tells_what_it_does(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    base = tiny(Z_IMAGE)
    assistant = assistant_of(base, tmp_path / "assistant")
    own = sum(each.numel() for each in load_file(assistant).values())
    settings = config(base, f"model.assistant={assistant}")
    assert footprint(settings).base == footprint(config(base)).base + own
    assert footprint(settings).trained == footprint(config(base)).trained
    assert footprint(settings).whole("lora") == sum(p.numel() for p in build_model(settings)[1].parameters())
    assert check_stages(config(base))[0].endswith(
        "or give model.assistant, an adapter that undoes the distillation while it trains"
    )
    [line] = check_stages(settings)
    assert line.startswith(f"model.assistant: {assistant} is on while training and off after")


def test_its_content_decides_which_training_is_resumed(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    base = tiny(Z_IMAGE)
    assistant = assistant_of(base, tmp_path / "assistant")
    settings = config(base, f"model.assistant={assistant}")
    before, plain = (began_with(each, DATA, None) for each in (settings, config(base)))
    assert "assistant" not in plain and "assistant" not in plain["model"]
    assert before["model"] == plain["model"] | {"assistant": str(assistant)}
    trial = Storage.open(str(tmp_path / "trial"))
    require_same(trial, before)
    require_same(trial, began_with(settings, DATA, None))
    save_file({name: 2 * each for name, each in load_file(assistant).items()}, assistant)
    with pytest.raises(ConfigError, match=r"^assistant: \w{64} now, but the training in .* started with"):
        require_same(trial, began_with(settings, DATA, None))


def test_its_content_decides_which_search_is_resumed(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    assistant = assistant_of(tiny(Z_IMAGE), tmp_path / "assistant")
    settings = config(tiny(Z_IMAGE), f"model.assistant={assistant}", f"storage={tmp_path / 'runs'}")
    search = RunFolder.of(settings).search
    search.write_text(FINISHED, finished(settings, DATA, BEST))
    digests = search_digests(settings, DATA)
    assert read_result(settings, DATA)
    save_file({name: 2 * each for name, each in load_file(assistant).items()}, assistant)
    assert read_result(settings, DATA) is None
    assert not set(digests).intersection(search_digests(settings, DATA))


@pytest.mark.parametrize("alpha", [1.0, 6.0])
def test_scales_of_a_file_are_those_that_diffusers_reads(
    tiny: Callable[[str], Path], tmp_path: Path, alpha: float
) -> None:
    """In the metadata, as diffusers writes it."""
    base = tiny(SCHNELL)
    path = assistant_of(base, tmp_path / "assistant")
    told = {"transformer.r": RANK, "transformer.lora_alpha": alpha, "transformer.target_modules": ["to_q"]}
    tensors = {name: each for name, each in load_file(path).items() if "to_q" in name}
    save_file(tensors, path, {"format": "pt", "lora_adapter_metadata": json.dumps(told)})
    layers = [
        layer
        for layer in build_model(config(base, f"model.assistant={path}"))[1].modules()
        if isinstance(layer, BaseTunerLayer) and "assistant" in layer.scaling
    ]
    assert len(layers) == len(tensors) // 2
    assert {layer.scaling["assistant"] for layer in layers} == {alpha / RANK}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: {k.replace("layers.0", "layers.7"): v for k, v in t.items()},
            r"of \d+ tensors have no place .*layers\.7",
        ),
        (
            lambda t: {k: v[:, :-1] if "to_q.lora_A" in k else v for k, v in t.items()},
            r"[1-9] of .*to_q\.lora_A",
        ),
        (lambda t: {k: v for k, v in t.items() if "to_q.lora_B" not in k}, r"to_q\.lora_A\.weight"),
        (lambda t: t | {"text_encoder.layers.0.q.lora_A.weight": torch.ones(2, 2)}, r"1 of .*text_encoder\."),
        (lambda t: t | {"transformer.layers.0.attention.to_q.lora_magnitude_vector": torch.ones(2)}, "DoRA"),
        (lambda t: {"transformer.layers.0.attention.to_q.lokr_w1": torch.ones(2, 2)}, "LoKr"),
        (lambda t: {"other": torch.ones(2)}, r"other"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_with_names(
    tiny: Callable[[str], Path],
    tmp_path: Path,
    change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]],
    message: str,
) -> None:
    base = tiny(Z_IMAGE)
    path = assistant_of(base, tmp_path / "assistant")
    save_file({name: each.contiguous() for name, each in change(load_file(path)).items()}, path)
    with pytest.raises(ConfigError, match=rf"model\.assistant: {path}: .*{message}") as refused:
        check_stages(config(base, f"model.assistant={path}"))
    assert "\n" not in str(refused.value)


def test_a_file_that_is_not_there_or_not_the_only_one_is_named(
    tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny(Z_IMAGE)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def refusal(name: Path) -> str:
        with pytest.raises(ConfigError) as refused:
            check_stages(config(base, f"model.assistant={name}"))
        return str(refused.value)

    assert refusal(tmp_path / "none").startswith(f"model.assistant: {tmp_path / 'none'}: neither a file")
    folder = assistant_of(base, tmp_path / "assistant").parent
    (folder / "adapter.txt").write_text("no adapter")
    assert len(check_stages(config(base, f"model.assistant={folder}"))) == 1
    (folder / "second.safetensors").write_bytes(b"")
    assert f"{folder}: has adapter.safetensors, second.safetensors; name one of them" in refusal(folder)
    assert "no safetensors file" in refusal(folder / "second.safetensors")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("train.method=full", r"model\.assistant: org/adapter is for adapters; set train\.method: lora"),
        ("search.space={train.method: [lora, full]}", r"model\.assistant: org/adapter is for adapters"),
        ("model.assistant=null", r"assistant_revision: v2 changes nothing without assistant"),
    ],
)
def test_what_does_not_go_with_it_is_refused(setting: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        load_config(DEMO, ["model.assistant=org/adapter", "model.assistant_revision=v2", setting])
    assert "\n" not in str(refused.value)
