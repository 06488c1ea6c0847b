"""LoHa, LoKr and OFT are trained, resumed, drawn and served as LoRA is, or refused by name."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ray_jobs.config import ConfigError, load_config
from ray_jobs.planning.footprint import footprint
from ray_jobs.training.setup import build_model, check_settings, exporter
from ray_jobs.training.state import snapshot, whole
from ray_jobs.weights.adapter_files import low_rank_layers, read_adapter_file
from ray_jobs.weights.loading import LORA_WEIGHTS, load_pipeline
from serving.engine.engine import Engine
from tests.unit.test_estimate import saved_by_autograd
from tests.unit.test_quantization import DEMO, TRANSFORMER, UNET, Training, config, pixels, served

KINDS = {
    "loha": ["train.lora={kind: loha, rank: 2, alpha: 4}"],
    "lokr": ["train.lora={kind: lokr, rank: 1, alpha: 4, factor: 4}"],
    "oft": ["train.lora={kind: oft, block: 8}"],
}
RATE = "train.learning_rate=0.01"
kinds = pytest.mark.parametrize("kind", KINDS)


def difference(one: torch.Tensor, other: torch.Tensor) -> int:
    """The largest difference of two pictures, in levels of 255."""
    return int((one.int() - other.int()).abs().max())


@torch.no_grad()
def drawn_by(training: Training, base: Path) -> torch.Tensor:
    """Draw with the trained module itself, with its averages."""
    averages = whole(training.engine, training.ema.averages)
    training.model.eval()
    for name, parameter in training.model.named_parameters():
        if name in averages:
            parameter.copy_(averages[name])
    pipeline: Any = load_pipeline(str(base))  # with text encoders
    for name, part in training.model.model.items():
        setattr(pipeline, name, part)
    return pixels(pipeline)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "name", "more"),
    [
        *((kind, name, []) for kind in KINDS for name in (UNET, TRANSFORMER)),
        ("lokr", TRANSFORMER, ["model.quantize=nf4"]),
    ],
)
def test_a_kind_learns_resumes_to_the_bit_and_draws_where_it_is_loaded(
    tiny: Callable[[str], Path], kind: str, name: str, more: list[str], tmp_path: Path
) -> None:
    base = tiny(name)
    settings = [*KINDS[kind], RATE, *more]
    training = Training(config(base, *settings))
    training.start()
    first = training.run(1, 2)
    held = ["train.use_gpu=true", "train.precision=fp32", "train.gradient_checkpointing=true"]
    resumed = Training(config(base, *settings, *held, "train.offload_base=true"))
    resumed.start(training.write(tmp_path / "state"))
    later = training.run(3, 8)
    assert resumed.run(3, 8) == pytest.approx(later, abs=1e-6)
    assert training.run(1, 2) < first  # the same rows, noise and timesteps
    again = Training(config(base, *settings))
    again.start(training.write(tmp_path / "later"))
    ours, theirs = (snapshot(each.engine, each.ema.averages)[0] for each in (again, training))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)

    folder = training.weights(tmp_path / "weights")
    quantization = training.config.model.quantize
    bare = pixels(load_pipeline(str(base), quantization=quantization))
    loaded = load_pipeline(str(base), folder, quantization=quantization)
    trained = pixels(loaded)
    assert difference(trained, drawn_by(training, base)) <= 1
    assert difference(trained, bare) > 5
    adapter = (folder / LORA_WEIGHTS).exists()
    assert adapter == training.config.train.makes_adapter == (kind != "oft")
    of_engine = load_pipeline(str(base), quantization=quantization) if adapter else loaded
    engine = Engine(of_engine, device="cpu", adapter_folder=lambda _: folder)
    [picture] = served(engine, "trained" if adapter else None)
    engine.close()
    assert difference(picture, trained.permute(1, 2, 0)) <= 1


@kinds
def test_text_encoders_have_a_kind_too(tiny_model: Path, kind: str, tmp_path: Path) -> None:
    settings = config(tiny_model, *KINDS[kind], "train.train_text_encoder=true")
    pipeline, model = build_model(settings)
    torch.manual_seed(0)
    weights = {name: 0.3 * torch.randn_like(parameter) for name, parameter in model.trained()}
    assert any(name.startswith("text_encoders.text_encoder.") for name in weights)
    (tmp_path / "out").mkdir()
    exporter(settings, pipeline, model, 0)(weights, tmp_path / "out")
    tokens = torch.arange(7)[None]

    def states(of: Any) -> torch.Tensor:
        with torch.no_grad():
            return of.text_encoder(tokens).last_hidden_state

    before = states(load_pipeline(str(tiny_model)))
    with torch.no_grad():
        for name, parameter in model.trained():
            parameter.copy_(weights[name])
    model.eval()
    found = states(load_pipeline(str(tiny_model), tmp_path / "out"))
    torch.testing.assert_close(found, states(pipeline), rtol=0, atol=2e-5)
    assert (found - before).abs().max() > 0.1


def test_convolutions_and_layers_of_several_sizes_are_the_lora_that_they_are(
    tiny_model: Path, tmp_path: Path
) -> None:
    layers = "target_modules: [to_q, conv1, conv_in]"
    settings = config(tiny_model, f"train.lora={{kind: lokr, rank: 1, alpha: 1, factor: 8, {layers}}}", RATE)
    training = Training(settings)
    training.start()
    training.run(1, 2)
    folder = training.weights(tmp_path / "weights")
    found = low_rank_layers(*read_adapter_file(folder / LORA_WEIGHTS))
    assert all(own.scale == 1 for own in found.values())
    assert {own.down.dim() for own in found.values()} == {2, 4}
    assert len({len(own.down) for own in found.values()}) > 1
    trained = pixels(load_pipeline(str(tiny_model), folder))
    assert difference(trained, drawn_by(training, tiny_model)) <= 1


@pytest.mark.parametrize(
    ("kind", "name"), [*((kind, TRANSFORMER) for kind in KINDS), ("lokr", "Lumina2Pipeline")]
)
def test_the_plan_counts_the_matrices_of_a_kind_once(
    tiny: Callable[[str], Path], kind: str, name: str
) -> None:
    base = tiny(name)
    settings = config(base, *KINDS[kind])
    _, model = build_model(settings)
    found = footprint(settings)
    assert found.trained == sum(parameter.numel() for _, parameter in model.all_trained)
    for rows in (1, 4):
        kept = saved_by_autograd(model, base, rows)
        assert kept <= rows * found.activations + found.fixed < (1.05 if rows == 1 else 1.001) * kept
    assert found.fixed > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["train.lora={kind: loha, use_dora: true}"], "use_dora: True changes nothing with kind: loha"),
        (["train.lora={kind: lokr, dropout: 0.1}"], "dropout: 0.1 changes nothing with kind: lokr"),
        (["train.lora={kind: oft, rank: 4}"], "rank: 4 changes nothing with kind: oft; remove it"),
        (["train.lora={factor: 4}"], "factor: 4 changes nothing with kind: lora"),
        (["train.lora={kind: lora, block: 16}"], "block: 16 changes nothing with kind: lora"),
        (["train.lora={kind: lokr}", "train.zero_stage=3"], r"lora\.kind: lokr .* zero_stage: 3 divides"),
        (["train.lora={kind: oft}", "model.quantize=nf4"], r"quantize: nf4 has no weights .*kind: oft"),
        (["train.lora={kind: loha}", "model.assistant=a"], r"beside which train\.lora\.kind: loha is not"),
        (["train.lora={kind: loha}", "search.pack=2"], r"train\.lora\.kind: only lora is trained several"),
        (["search.space={train.lora.kind: [lora, oft]}", "search.pack=2"], r"train\.lora\.kind: only lora"),
    ],
)
def test_what_a_kind_cannot_have_is_refused_in_one_line(settings: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refusal:
        load_config(DEMO, ["train.lora={}", *settings])
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ("{kind: lokr, rank: 8, factor: 4}", r"rank: 8 is not less than half .* lower rank or factor"),
        ("{kind: oft, block: 7}", r"block: 7 does not divide its \d+ inputs"),
        ("{kind: oft, block: 8, target_modules: [conv1]}", "OFT is for linear layers here"),
    ],
)
def test_sizes_that_do_not_suit_a_layer_are_refused_with_its_name(
    tiny_model: Path, lora: str, message: str
) -> None:
    with pytest.raises(ValueError, match=rf"^train\.lora: unet: \w+_blocks\..*: {message}"):
        check_settings(config(tiny_model, f"train.lora={lora}"))
