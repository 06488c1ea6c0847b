"""Training goes on from an adapter: from its very numbers, and whatever program wrote them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from cluster.storage import Storage
from ray_jobs.config import Config, ConfigError, load_config
from ray_jobs.diffusion.families import family_of
from ray_jobs.evaluation.actor import BARE, Evaluator
from ray_jobs.planning.checks import check_stages
from ray_jobs.planning.footprint import footprint
from ray_jobs.training.setup import build_pack
from ray_jobs.training.trainer import began_with, require_same
from ray_jobs.tuning.results import search_digests
from ray_jobs.weights.comfyui import comfyui_file
from ray_jobs.weights.loading import LORA_WEIGHTS, load_lora, load_pipeline
from ray_jobs.weights.starting_adapter import adapter_folder, with_form_of_adapter
from tests.unit.test_affects import DATA
from tests.unit.test_quantization import DEMO, TRANSFORMER, UNET, Training, pixels

SHORT = ["train.num_workers=1", "train.batch_size=4", "data.resolution=64", "train.learning_rate=0.01"]


def config(base: Path, *overrides: str) -> Config:
    """The demo's, with its own adapter's form left out."""
    found = load_config(DEMO, [f"model.base={base}", *SHORT, "train.lora.target_modules=null", *overrides])
    given = {each.partition("=")[0].rpartition(".")[2] for each in overrides if "train.lora." in each}
    lora = type(found.train.lora)(**{name: getattr(found.train.lora, name) for name in given})
    return found.model_copy(update={"train": found.train.model_copy(update={"lora": lora})})


def further(base: Path, adapter: Path, *overrides: str) -> Config:
    return with_form_of_adapter(config(base, f"model.adapter={adapter}", *overrides))


def trained(base: Path, folder: Path, *settings: str, steps: int = 2) -> Path:
    """A folder with an adapter that was trained a little."""
    training = Training(config(base, "train.lora.rank=3", "train.lora.alpha=6", *settings))
    training.start()
    training.run(1, steps)
    return training.weights(folder)


def told(folder: Path) -> dict[str, Any]:
    """The settings in an adapter's file."""
    with safe_open(folder / LORA_WEIGHTS, "pt") as file:
        found: dict[str, Any] = json.loads(file.metadata()["lora_adapter_metadata"])
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "form", "others"),
    [
        (UNET, ["train.lora.use_dora=true"], ["train.train_text_encoder=true"]),
        (TRANSFORMER, ["train.lora.use_rslora=true"], ["train.precision=bf16", "model.quantize=nf4"]),
        ("ChromaPipeline", [], ["train.precision=bf16"]),
        ("PixArtSigmaPipeline", [], []),
    ],
)
def test_training_begins_with_the_numbers_of_the_file(
    tiny: Callable[[str], Path], tmp_path: Path, name: str, form: list[str], others: list[str]
) -> None:
    base = tiny(name)
    first = trained(base, tmp_path / "first", *form, *others)
    settings = further(base, first, *others)
    lora = settings.train.lora
    assert (lora.rank, lora.alpha) == (3, 6)
    assert (lora.use_dora, lora.use_rslora) == tuple(
        f"use_{kind}" in "".join(form) for kind in ("dora", "rslora")
    )
    second = Training(settings)
    second.start()
    again = second.weights(tmp_path / "again")
    before, after = load_file(first / LORA_WEIGHTS), load_file(again / LORA_WEIGHTS)
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert any(each.any() for key, each in before.items() if "lora_B" in key)
    kept = ("r", "lora_alpha", "use_dora", "use_rslora")
    scales = [{key: each for key, each in told(f).items() if key.endswith(kept)} for f in (first, again)]
    assert scales[0] == scales[1]
    assert torch.equal(pixels(load_pipeline(str(base), first)), pixels(load_pipeline(str(base), again)))
    assert footprint(settings).trained == sum(each.numel() for each in before.values())


@pytest.mark.slow
def test_steps_without_the_optimizers_state_are_what_a_training_from_there_takes(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    """Without EMA or momentum, ten steps and ten more are twenty, as far as the steps' noise allows."""
    base, plain = tiny(UNET), ["train.ema_decay=0", "train.betas=[0.0,0.0]", "train.schedule=constant"]
    whole = Training(config(base, "train.lora.rank=3", "train.lora.alpha=6", *plain))
    whole.start()
    expected = whole.run(1, 4)
    first = Training(config(base, "train.lora.rank=3", "train.lora.alpha=6", *plain))
    first.start()
    assert first.run(1, 2) == expected[:2]
    second = Training(further(base, weights(first, tmp_path / "first"), *plain))
    second.start()
    assert second.run(3, 4) == expected[2:]


def weights(training: Training, folder: Path) -> Path:
    """What was trained, not its average."""
    from ray_jobs.training.state import whole

    folder.mkdir()
    training.export(whole(training.engine, training.engine.averaged), folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", [UNET, TRANSFORMER])
def test_a_file_for_comfyui_is_the_adapter_that_it_was_made_of(
    tiny: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    base = tiny(name)
    first = trained(base, tmp_path / "first")
    foreign = tmp_path / "kohya.safetensors"
    foreign.write_bytes(comfyui_file(str(base), first))
    assert load_file(foreign).keys().isdisjoint(load_file(first / LORA_WEIGHTS)) or name != UNET
    settings = further(base, foreign)
    again = Training(settings)
    again.start()
    plain = load_pipeline(str(base))
    expected = pixels(load_pipeline(str(base), again.weights(tmp_path / "again")))
    family = family_of(plain)
    with adapter_folder(settings.model, family, getattr(plain, family.denoiser)) as folder:
        load_lora(plain, folder)
    assert torch.equal(pixels(plain), expected)
    assert (pixels(load_pipeline(str(base), first)).int() - expected.int()).abs().max() <= 1


@pytest.mark.slow
def test_an_evaluator_draws_the_start_of_the_run_where_others_have_the_base(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    base: Any = tiny(UNET)
    none: Any = None
    first, second = (trained(base, tmp_path / str(steps), steps=steps) for steps in (1, 3))

    def pictures(evaluator: Evaluator, *weights: str | None) -> list[list[bytes]]:
        return [evaluator.sample_pictures(each, ["a small red circle"], [7]) for each in weights]

    plain = Evaluator(config(base), none, 1)
    drawn = pictures(plain, None, str(first), str(second), None)
    assert drawn[0] == drawn[3] and drawn[0] != drawn[1] != drawn[2]
    begun = Evaluator(further(base, first), none, 1)
    asked = None, str(second), BARE, None, str(first), BARE
    assert pictures(begun, *asked) == [drawn[number] for number in (1, 2, 0, 1, 1, 0)]


@pytest.mark.slow
def test_layers_of_other_ranks_keep_them(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """In a file without settings each layer's scale is 1."""
    base = tiny(UNET)
    first = trained(base, tmp_path / "first")
    file = first / LORA_WEIGHTS
    cut: dict[str, torch.Tensor] = {}
    for name, each in load_file(file).items():
        short = each[:1] if "lora_A" in name else each[:, :1]
        cut[name] = (short if "to_k" in name else each).contiguous()
    save_file(cut, file)
    settings = further(base, first)
    assert (settings.train.lora.rank, settings.train.lora.alpha) == (3, 3)
    again = Training(settings)
    again.start()
    folder = again.weights(tmp_path / "again")
    after = load_file(folder / LORA_WEIGHTS)
    assert cut.keys() == after.keys() and all(torch.equal(cut[name], after[name]) for name in cut)
    assert torch.equal(pixels(load_pipeline(str(base), first)), pixels(load_pipeline(str(base), folder)))


@pytest.mark.slow
def test_each_trial_of_a_pack_begins_with_the_adapter(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    base = tiny(UNET)
    first = trained(base, tmp_path / "first")
    trials = [further(base, first, f"train.learning_rate={rate}") for rate in (0.1, 0.01)]
    assert trials[0].why_not_together == ""
    stored = load_file(first / LORA_WEIGHTS)
    for member in build_pack(trials)[1].members.values():
        found = {name.replace(".default.weight", ".weight"): each for name, each in member.trained()}
        assert len(found) == len(stored)
        for name, each in stored.items():
            assert torch.equal(found[name.replace("unet.", "denoiser.", 1)], each)


@pytest.fixture(scope="module")
def untrained(tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tiny(UNET), tmp_path_factory.mktemp("untrained") / "first", steps=0)


@pytest.fixture
def adapter(untrained: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(untrained, tmp_path / "first"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("train.lora.rank=4", r"train\.lora\.rank: 4, but model\.adapter: .*, has 3"),
        ("train.lora.rank=16", r"train\.lora\.rank: 16, but .* has 3"),
        ("train.lora.alpha=3", r"train\.lora\.alpha: 3, but .* has 6"),
        ("train.lora.use_dora=true", r"train\.lora\.use_dora: True, but .* has False"),
        ("train.lora.target_modules=[to_q]", r"train\.lora\.target_modules: \['to_q'\], but .* also has"),
        (
            "train.lora.target_modules=[to_q,to_k,to_v,to_out.0,conv_in]",
            r"train\.lora\.target_modules: .* has none of conv_in",
        ),
        ("train.train_text_encoder=true", r"it has no tensor of text_encoder, and train\.train_text_encoder"),
    ],
)
def test_settings_that_contradict_the_adapter_are_refused(
    tiny: Callable[[str], Path], adapter: Path, setting: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        check_stages(further(tiny(UNET), adapter, setting))
    assert "\n" not in str(refused.value)


@pytest.mark.slow
def test_settings_that_say_the_same_are_not(
    tiny: Callable[[str], Path], adapter: Path, tmp_path: Path
) -> None:
    same = ["train.lora.rank=3", "train.lora.alpha=6", "train.lora.dropout=0.1"]
    found = further(tiny(UNET), adapter, *same, "train.lora.target_modules=[to_q,to_k,to_v,to_out.0]")
    check_stages(found)
    (tmp_path / "written.yaml").write_text(found.to_yaml())
    assert with_form_of_adapter(load_config(tmp_path / "written.yaml")) == found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: {k.replace("unet.", "transformer.", 1): v for k, v in t.items()},
            r"no place .*\(transformer\.",
        ),
        (lambda t: {k.replace("to_q", "to_x"): v for k, v in t.items()}, r"no place .*to_x\.lora_A"),
        (lambda t: {k: v[:, :-1] if "lora_A" in k else v for k, v in t.items()}, "no place"),
        (lambda t: {k: v for k, v in t.items() if "to_q.lora_B" not in k}, r"no place .*to_q\.lora_A"),
        (
            lambda t: (
                t
                | {
                    "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(
                        2, 2
                    )
                }
            ),
            r"text_encoder\.text_model.* is of a text encoder, and train\.train_text_encoder is false",
        ),
        (
            lambda t: t | {"unet.conv_in.dora_scale": torch.ones(2)},
            r"unet\.conv_in\.dora_scale: diffusers has no single layer for it",
        ),
        (lambda t: t | {"unet.conv_in.diff_b": torch.ones(2)}, r"unet\.conv_in\.diff_b: no part of a LoRA"),
        (lambda t: {"unet.conv_in.lokr_w1": torch.ones(2, 2)}, "LoKr"),
        (lambda t: {"unet.conv_in.alpha": torch.ones(())}, "there is no LoRA in it"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_with_names(
    tiny: Callable[[str], Path],
    adapter: Path,
    change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]],
    message: str,
) -> None:
    file = adapter / LORA_WEIGHTS
    save_file({name: each.contiguous() for name, each in change(load_file(file)).items()}, file)
    with pytest.raises(ConfigError, match=rf"model\.adapter: .*{message}") as refused:
        check_stages(further(tiny(UNET), adapter))
    assert "\n" not in str(refused.value)


@pytest.mark.slow
def test_a_path_that_is_no_adapter_is_refused(
    tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    base = tiny(UNET)

    def refusal(path: Path) -> str:
        with pytest.raises(ConfigError) as refused:
            further(base, path)
        return str(refused.value)

    assert refusal(tmp_path / "none").startswith(f"model.adapter: {tmp_path / 'none'}: neither a file")
    assert refusal(base) == f"model.adapter: {base} is a whole model; give it as model.base"
    (tmp_path / "old").mkdir()
    pickled = tmp_path / "old" / "pytorch_lora_weights.bin"
    pickled.write_bytes(b"")
    for path in (pickled, pickled.parent):
        assert "pytorch_lora_weights.bin is pickled, and loading it could run any program" in refusal(path)
    (tmp_path / "broken.safetensors").write_bytes(b"no tensors")
    assert "no safetensors file" in refusal(tmp_path / "broken.safetensors")
    scheduled = trained(base, tmp_path / "scheduled", "train.loss.zero_terminal_snr=true", steps=0)
    assert refusal(scheduled).startswith("train.loss.zero_terminal_snr: false, but model.adapter")


@pytest.mark.slow
def test_its_content_decides_which_training_and_search_are_resumed(
    tiny: Callable[[str], Path], adapter: Path, tmp_path: Path
) -> None:
    settings = further(tiny(UNET), adapter)
    trial = Storage.open(str(tmp_path / "trial"))
    require_same(trial, began_with(settings, DATA, None))
    digests = search_digests(settings, DATA)
    file = adapter / LORA_WEIGHTS
    save_file({name: each + 1 for name, each in load_file(file).items()}, file)
    with pytest.raises(ConfigError, match=r"^adapter: \w{64} now, but the training in .* started with"):
        require_same(trial, began_with(settings, DATA, None))
    assert not set(digests).intersection(search_digests(settings, DATA))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["train.method=full"], r"model\.adapter: org/adapter is for adapters; set train\.method: lora"),
        (["search.space={train.method: [lora, full]}"], r"model\.adapter: org/adapter is for adapters"),
        (
            ["search.space={train.lora.rank: [4, 8]}"],
            r"search\.space\.train\.lora\.rank: training goes on from",
        ),
        (["search.space={train.lora: [{rank: 4}, {dropout: 0.1}]}"], r"search\.space\.train\.lora: training"),
        (["model.adapter=null"], r"adapter_revision: v2 changes nothing without adapter"),
        (["model.adapter=first@3"], r"adapter_revision: v2 changes nothing for a version of the registry"),
    ],
)
def test_what_does_not_go_with_it_is_refused(settings: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        load_config(DEMO, ["model.adapter=org/adapter", "model.adapter_revision=v2", *settings])
    assert "\n" not in str(refused.value)
    load_config(DEMO, ["model.adapter=org/adapter", "search.space={train.lora: [{dropout: 0.1}, {}]}"])
