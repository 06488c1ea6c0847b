"""What is trained of each family's model, and that plain diffusers loads what is saved."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from ray_jobs.diffusion.families import family_of
from ray_jobs.diffusion.finetuning import FineTuning, add_lora, choose_layers
from ray_jobs.diffusion.objectives import LossSettings
from ray_jobs.diffusion.randomness import draw
from ray_jobs.weights.loading import LORA_WEIGHTS, load_pipeline
from ray_jobs.weights.saving import save_lora, save_pipeline
from tests.tiny_models import FAMILY_MODELS, painted


@pytest.fixture(params=FAMILY_MODELS)
def base(request: pytest.FixtureRequest, tiny: Callable[[str], Path]) -> Path:
    return tiny(request.param)


def finetuning(base: Path, method: str, *, text_encoders: bool = False) -> tuple[Any, FineTuning]:
    """A pipeline and what is trained of it."""
    pipeline = load_pipeline(str(base))
    family = family_of(pipeline)
    for name in family.trainable if text_encoders else family.denoisers:
        part = getattr(pipeline, name)
        if method == "full":
            part.requires_grad_(True)
        else:
            layers, dora = family.trainable[name], method == "dora"
            add_lora(part, rank=2, alpha=4, dropout=0.0, target_modules=list(layers), use_dora=dora)
    objective = family.schedule.objective(pipeline.scheduler.config)
    model = FineTuning(pipeline, family, objective, LossSettings(), text_encoders_trained=text_encoders)
    return pipeline, model


def inputs(pipeline: Any, model: FineTuning) -> dict[str, Any]:
    """A fixed batch of four pictures."""
    torch.manual_seed(0)
    family = model.family
    shape = family.codec.shape(pipeline.vae.config, 64, 64)
    captions = ["a red circle", "a blue cross", "", "a big green square"]
    tokens = family.text.tokenize(pipeline, captions)
    tokens = {name: each if each.dtype == torch.bool else each.long() for name, each in tokens.items()}
    with torch.no_grad():
        embeds = family.text.embed(family.text.present(pipeline), tokens)
    drawn = draw((0,), 1, range(4), shape, model.settings)
    batch: dict[str, Any] = {
        "latents": torch.randn(4, *shape),
        "conditions": tokens if model.text_encoders else embeds,
        "draws": drawn.loss,
    }
    batch["conditions"] |= painted(family, shape, 4)
    if "sizes" in family.picture_conditions:
        batch["conditions"]["sizes"] = torch.tensor([[80, 72, 0, 4, 64, 64]] * 4)
    return batch


def steps(model: FineTuning, batch: dict[str, Any], count: int) -> list[float]:
    """The losses of so many steps on one batch."""
    optimizer = torch.optim.AdamW([p for _, p in model.trained()], lr=3e-3)
    losses = []
    for _ in range(count):
        loss = model(**batch).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("method", ["lora", "full"])
def test_every_method_lowers_the_loss_and_leaves_what_is_frozen(base: Path, method: str) -> None:
    pipeline, model = finetuning(base, method)
    batch = inputs(pipeline, model)
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    losses = steps(model, batch, 12)
    assert losses[-1] < losses[0]
    assert bool(frozen) == (method == "lora")
    now = dict(model.named_parameters())
    assert all(torch.equal(now[name], value) for name, value in frozen.items())


@pytest.mark.parametrize("text_encoders", [False, True])
def test_saved_adapters_are_loaded_as_they_were_trained(
    base: Path, text_encoders: bool, tmp_path: Path
) -> None:
    pipeline, model = finetuning(base, "lora", text_encoders=text_encoders)
    batch = inputs(pipeline, model)
    steps(model, batch, 3)
    folder = tmp_path / "run" / "weights"  # neither exists
    save_lora(pipeline, model, dict(model.trained()), folder)
    loaded = load_pipeline(str(base), folder)
    family = model.family
    again = FineTuning(loaded, family, model.objective, model.settings, text_encoders_trained=text_encoders)
    with torch.no_grad():
        assert torch.allclose(again(**batch), model(**batch), atol=1e-5)
        untouched = FineTuning(load_pipeline(str(base)), family, model.objective, model.settings)
        assert not torch.allclose(untouched(**inputs(pipeline, untouched)), model(**batch), atol=1e-4)


def test_the_same_adapters_are_the_same_file_in_every_process(tiny_model: Path, tmp_path: Path) -> None:
    pipeline = load_pipeline(str(tiny_model))
    add_lora(pipeline.unet, rank=2, alpha=4, dropout=0.3, target_modules=["to_q", "to_v"])
    objective = family_of(pipeline).schedule.objective(pipeline.scheduler.config)
    model = FineTuning(pipeline, family_of(pipeline), objective, LossSettings())
    save_lora(pipeline, model, dict(model.trained()), tmp_path)
    with safe_open(tmp_path / LORA_WEIGHTS, "pt") as file:
        told = json.loads(file.metadata()["lora_adapter_metadata"])
    known = {"r", "lora_alpha", "lora_dropout", "init_lora_weights", "target_modules"}
    known |= {"rank_pattern", "alpha_pattern"}
    assert set(told) == {f"unet.{name}" for name in known}, "an older peft refuses what it does not know"
    assert told["unet.lora_dropout"] == 0.0, "diffusers loads adapters in training mode"
    targets = told["unet.target_modules"]
    assert len(targets) > 1 and targets == sorted(targets), "sets have another order in each process"


def test_dora_is_saved_and_loaded_with_its_magnitudes(base: Path, tmp_path: Path) -> None:
    pipeline, model = finetuning(base, "dora")
    batch = inputs(pipeline, model)
    steps(model, batch, 3)
    save_lora(pipeline, model, dict(model.trained()), tmp_path)
    again = FineTuning(load_pipeline(str(base), tmp_path), model.family, model.objective, model.settings)
    with torch.no_grad():
        assert torch.allclose(again(**batch), model(**batch), atol=1e-5)


def test_a_whole_pipeline_is_saved_with_the_weights_it_is_given(base: Path, tmp_path: Path) -> None:
    pipeline, model = finetuning(base, "full")
    batch = inputs(pipeline, model)
    steps(model, batch, 2)
    whole = load_pipeline(str(base))
    components = {name: (prefix, getattr(whole, name)) for name, (prefix, _) in model.components.items()}
    save_pipeline(base, components, dict(model.trained()), tmp_path)
    again = FineTuning(load_pipeline(str(tmp_path)), model.family, model.objective, model.settings)
    with torch.no_grad():
        assert torch.allclose(again(**batch), model(**batch), atol=1e-6)


def test_adapters_of_convolutions_and_projections_load_in_plain_diffusers(
    tiny_model: Path, tmp_path: Path
) -> None:
    from diffusers import StableDiffusionPipeline

    torch.manual_seed(0)
    pipeline = load_pipeline(str(tiny_model))
    targets = ["to_q", "to_out.0", "proj_in", "ff.net.2", "conv1"]
    add_lora(pipeline.unet, rank=4, alpha=8, dropout=0.0, target_modules=targets)
    for parameter in pipeline.unet.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    family = family_of(pipeline)
    model = FineTuning(pipeline, family, family.schedule.objective(pipeline.scheduler.config), LossSettings())
    save_lora(pipeline, model, dict(model.trained()), tmp_path)
    plain = StableDiffusionPipeline.from_pretrained(tiny_model, safety_checker=None)
    config = plain.unet.config
    arguments = (torch.randn(1, config.in_channels, 8, 8), 10, torch.randn(1, 5, config.cross_attention_dim))
    with torch.no_grad():
        before = plain.unet(*arguments).sample
        plain.load_lora_weights(tmp_path)
        loaded, trained = plain.unet(*arguments).sample, pipeline.unet(*arguments).sample
    assert torch.allclose(loaded, trained, atol=1e-5)
    assert float((before - trained).abs().max()) > 1e-3


def test_adapters_that_do_not_all_fit_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    pipeline, model = finetuning(tiny_model, "lora")
    save_lora(pipeline, model, dict(model.trained()), tmp_path)
    stored = load_file(tmp_path / LORA_WEIGHTS)
    renamed = {name.replace("attn1.to_q", "attn3.to_q"): value for name, value in stored.items()}
    save_file(renamed, tmp_path / LORA_WEIGHTS)
    with pytest.raises(ValueError, match=f"of {len(stored)} tensors fit the base model"):
        load_pipeline(str(tiny_model), tmp_path)


def test_only_the_chosen_groups_of_layers_are_trained(tiny_model: Path) -> None:
    _, model = finetuning(tiny_model, "full")
    groups = {"attention": ["*attn*"], "time": ["*time_emb*"]}
    choose_layers(model, groups, ["attention"])
    names = [name for name, _ in model.trained()]
    assert names and all("attn" in name for name in names)


@pytest.mark.parametrize(
    ("groups", "chosen", "expected"),
    [
        ({"attention": ["*atn*"]}, ["attention"], "groups.attention.*match no trained parameter"),
        ({"all": ["*"]}, ["other"], "contain no layer that this method trains"),
    ],
)
def test_a_choice_of_no_layers_is_refused(
    tiny_model: Path, groups: dict[str, list[str]], chosen: list[str], expected: str
) -> None:
    _, model = finetuning(tiny_model, "full")
    with pytest.raises(ValueError, match=expected):
        choose_layers(model, groups, chosen)
