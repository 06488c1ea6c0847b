"""Models for which diffusers has only a modular pipeline: their index, and what is written of them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ray_jobs.config import Config, ConfigError
from ray_jobs.diffusion.families import FAMILIES, family_of, flux_3
from ray_jobs.diffusion.finetuning import FineTuning, add_lora
from ray_jobs.diffusion.objectives import FlowMatching, LossSettings
from ray_jobs.diffusion.sampling import encode_prompts
from ray_jobs.planning.checks import check_stages
from ray_jobs.planning.plan import plan
from ray_jobs.publishing.model_card import usage
from ray_jobs.publishing.pages import guidance_arguments, published_base
from ray_jobs.weights.loading import empty_model, load_pipeline, read_index
from ray_jobs.weights.model_files import check_weights, model_digest
from ray_jobs.weights.model_index import MODULAR_INDEX, NEVER_LOADED, model_index
from ray_jobs.weights.saving import save_lora, save_pipeline
from tests.cards import without_torchvision
from tests.serving import plain_diffusers

NAME = "Flux3ModularPipeline"
DISTILLED = "Flux3DistilledModularPipeline"
PARTS = {"text_encoder", "tokenizer", "transformer", "vae"}
LONG = "a small red circle " * 50


@pytest.fixture
def base(tiny: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy, whose index names another place."""
    return Path(shutil.copytree(tiny(NAME), tmp_path / "base"))


def config_of(base: Path, **sections: Any) -> Config:
    given = {
        "name": "modular",
        "data": {"source": "pictures", "resolution": 64},
        "model": {"base": str(base)},
        "search": {"learning_rates": [1e-3], "ladder": [2]},
    }
    return Config.model_validate(given | sections)


def rewritten(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    index = json.loads((folder / MODULAR_INDEX).read_text())
    change(index)
    (folder / MODULAR_INDEX).write_text(json.dumps(index))


def test_a_modular_index_is_read_as_others_are(base: Path) -> None:
    def as_on_the_hub(index: dict[str, Any]) -> None:
        for name in PARTS:  # as blocks write it before anything is loaded
            index[name] = [None, None, index[name][2]]
        for name in NEVER_LOADED:
            index[name] = [None, None, {"type_hint": ["transformers", "AutoProcessor"]}]

    before = model_index(base)
    digest = model_digest(str(base))
    rewritten(base, as_on_the_hub)
    index = model_index(base)
    assert index == before == read_index(str(base))
    assert index["_class_name"] == NAME and index["transformer"] == ["diffusers", "Flux3Transformer2DModel"]
    assert {name for name, entry in index.items() if isinstance(entry, list)} == PARTS
    assert model_digest(str(base)) == digest
    check_weights(str(base))


def test_a_component_in_another_repository_is_named(base: Path) -> None:
    place = {"pretrained_model_name_or_path": "org/encoder", "subfolder": "model"}
    rewritten(base, lambda index: index["text_encoder"][2].update(place))
    load_pipeline(str(base), without=["vae", "text_encoder", "transformer"])  # its own copy is used
    shutil.rmtree(base / "text_encoder")
    with pytest.raises(ValueError, match=r"text_encoder is not in its folder.*org/encoder/model; put a copy"):
        load_pipeline(str(base))


@pytest.mark.parametrize(
    ("entries", "error"),
    [
        ({"_blocks_class_name": "QwenImageAutoBlocks"}, r"its blocks are of QwenImageModularPipeline"),
        (
            {"_class_name": "Flux4ModularPipeline"},
            r"is not supported.*the nearest is FluxPipeline",
        ),
    ],
)
def test_an_index_of_another_pipeline_is_refused(base: Path, entries: dict[str, str], error: str) -> None:
    rewritten(base, lambda index: index.update(entries))
    with pytest.raises(ValueError, match=error):
        load_pipeline(str(base), without=["vae", "text_encoder", "transformer"])


def test_blocks_without_a_name_are_those_of_the_pipeline(base: Path) -> None:
    rewritten(base, lambda index: index.update(_blocks_class_name="SequentialPipelineBlocks"))
    pipeline = load_pipeline(str(base), without=["vae", "text_encoder", "transformer"])
    assert type(pipeline).__name__ == NAME


def test_the_scheduler_is_the_blocks_unless_the_index_has_one(base: Path) -> None:
    def schedulers() -> list[Any]:
        loaded = load_pipeline(str(base), without=["vae", "text_encoder", "transformer"])
        return [loaded.scheduler.config.shift, empty_model(str(base), ["transformer"]).scheduler.config.shift]

    from diffusers import FlowMatchEulerDiscreteScheduler

    assert schedulers() == [6.93, 6.93]
    FlowMatchEulerDiscreteScheduler(shift=2.0).save_pretrained(base / "scheduler")
    kind = ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    place = {"type_hint": kind, "pretrained_model_name_or_path": None, "subfolder": "scheduler"}
    rewritten(base, lambda index: index.update(scheduler=[*kind, place]))
    assert schedulers() == [2.0, 2.0]


@pytest.mark.parametrize(("name", "error"), [(NAME, "is a flow map"), (DISTILLED, "is no flow map")])
def test_a_transformer_of_the_other_kind_is_refused_before_anything_starts(
    tiny: Callable[[str], Path], tmp_path: Path, name: str, error: str
) -> None:
    base = Path(shutil.copytree(tiny(name), tmp_path / "base"))
    path = base / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"flow_map": name == NAME}))
    with pytest.raises(ConfigError, match=rf"model\.base: its transformer {error}.*{name}.*distilled"):
        check_stages(config_of(base, evaluate={"guidance_scale": 1.0}))


def test_a_plan_for_pictures_of_another_size_names_the_resolution(base: Path) -> None:
    config = config_of(base, data={"source": "pictures", "resolution": 72})
    with pytest.raises(ConfigError, match=r"data\.resolution: 72 is not a multiple of 16.*use 64"):
        plan(config, [], None)


def test_a_flow_map_is_trained_on_steps_without_length(tiny: Callable[[str], Path]) -> None:
    pipeline, theirs = load_pipeline(str(tiny(DISTILLED))), plain_diffusers.load(tiny(DISTILLED))
    conditions, latents = encode_prompts(pipeline, ["red"]), torch.randn(1, 16, 4, 4)

    def predicted(**more: torch.Tensor) -> torch.Tensor:
        told = torch.tensor([900.0])
        return FAMILIES[DISTILLED].denoise(
            {"transformer": pipeline.transformer}, latents, told, conditions | more
        )

    with torch.no_grad():
        expected = theirs.transformer(
            latents.flatten(2).transpose(1, 2),
            encoder_hidden_states=conditions["prompt_embeds"][:, : flux_3.WINDOW],
            timestep=torch.tensor([0.9]),
            target_timestep=torch.tensor([0.9]),
            img_ids=flux_3.positions(0, 4, 4, 0, device=latents.device) * flux_3.IMAGE_SCALE,
            txt_ids=flux_3.positions(0, 0, 0, flux_3.WINDOW, device=latents.device).float(),
        )[0]
        assert torch.allclose(predicted().flatten(2).transpose(1, 2), expected, atol=1e-5)
        longer = predicted(next_timestep=torch.tensor([500.0]))
    assert (predicted() - longer).abs().max() > 1e-3


def finetuning(pipeline: Any) -> FineTuning:
    family = family_of(pipeline)
    objective = family.schedule.objective(pipeline.scheduler.config)
    assert isinstance(objective, FlowMatching) and objective.shift == pytest.approx(6.93)
    return FineTuning(pipeline, family, objective, LossSettings())


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_cards_program_draws_with_diffusers_modular_pipeline(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    pipeline, family, folder = load_pipeline(str(base)), FAMILIES[NAME], tmp_path / "model"
    folder.mkdir()
    torch.manual_seed(1)
    if method == "lora":
        layers, unused = list(family.trainable["transformer"]), family.unused_layers(pipeline.transformer)
        add_lora(pipeline.transformer, rank=2, alpha=2, dropout=0.5, target_modules=layers, unused=unused)
        for name, parameter in pipeline.transformer.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3)
        model = finetuning(pipeline)
        save_lora(pipeline, model, dict(model.trained()), folder)
        ours = load_pipeline(str(base), folder)
    else:
        model = finetuning(pipeline)
        weights = {
            f"denoiser.{name}": parameter + 0.05 * torch.randn_like(parameter)
            for name, parameter in pipeline.transformer.named_parameters()
        }
        save_pipeline(base, model.components, weights, folder)
        assert not {*NEVER_LOADED} & json.loads((folder / MODULAR_INDEX).read_text()).keys()
        ours = load_pipeline(str(folder))
    config = config_of(base, train={"method": method}, evaluate={"guidance_scale": 3.0, "inference_steps": 2})
    published = published_base(config)
    assert published.torchvision and published.blocks == "Flux3AutoBlocks"
    code = usage(config, published, "a small red circle", guidance_arguments(config))
    monkeypatch.chdir(folder)
    here = {"base": base} if method == "lora" else {}  # the card has its name only
    for name, path in here.items():
        (folder / name).symlink_to(path)
    found: dict[str, Any] = {}
    with without_torchvision():
        exec(code, found)
    theirs = found["picture"]
    assert theirs.size == (config.data.resolution, config.data.resolution)
    expected = drawn(ours, config)
    assert np.abs(np.asarray(theirs).astype(float) - expected.numpy()).max() <= 1
    assert np.abs(drawn(load_pipeline(str(base)), config).numpy() - expected.numpy()).max() > 5


def drawn(pipeline: Any, config: Any) -> torch.Tensor:
    """The picture of the card's program by our own sampler: float, height x width x 3."""
    from ray_jobs.diffusion.sampling import sample_pictures

    side = config.data.resolution
    pictures = sample_pictures(
        pipeline,
        ["a small red circle"],
        [0],
        shapes=[(side, side)],
        num_steps=config.evaluate.inference_steps,
        guidance_scale=config.evaluate.guidance_scale,
        batch_size=1,
    )
    return next(iter(pictures))[0].permute(1, 2, 0).float()


def test_a_folder_can_be_loaded_from_inside(
    tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers 5.23 takes `./generation_config.json` for a file if its subfolder has one."""
    monkeypatch.chdir(tiny(NAME))
    load_pipeline(".", without=["vae", "transformer"])


def test_captions_of_several_windows_share_a_call(tiny: Callable[[str], Path]) -> None:
    pipeline, family = load_pipeline(str(tiny(NAME))), FAMILIES[NAME]
    together = encode_prompts(pipeline, ["red", LONG])
    assert together["prompt_mask"].sum(dim=1).tolist() == [80, 320]
    latents = torch.randn(2, 16, 4, 6, generator=torch.Generator().manual_seed(0))
    told = torch.tensor([900.0, 300.0])
    with torch.no_grad():
        both = family.denoise(family.model(pipeline), latents, told, together)
        for row, caption in enumerate(["red", LONG]):
            alone = encode_prompts(pipeline, [caption])
            assert torch.allclose(together["prompt_embeds"][row], alone["prompt_embeds"][0], atol=1e-5)
            one = slice(row, row + 1)
            found = family.denoise(family.model(pipeline), latents[one], told[one], alone)
            assert torch.allclose(both[one], found, atol=1e-5)
        filled = together | {
            "prompt_embeds": together["prompt_embeds"].where(together["prompt_mask"][..., None], 5.0)
        }
        assert torch.allclose(family.denoise(family.model(pipeline), latents, told, filled), both, atol=1e-5)
        # The padding inside of a window is attended to.
        shorter = together["prompt_mask"].clone()
        shorter[0, 40:] = False
        other = family.denoise(family.model(pipeline), latents, told, together | {"prompt_mask": shorter})
        assert not torch.allclose(other[0], both[0], atol=1e-3) and torch.allclose(
            other[1], both[1], atol=1e-5
        )


def test_a_caption_that_is_too_long_is_cut_as_by_the_pipeline(tiny: Callable[[str], Path]) -> None:
    folder, text = tiny(NAME), FAMILIES[NAME].text
    pipeline, theirs = load_pipeline(str(folder)), plain_diffusers.load(folder)
    assert text.cut(pipeline, ["red", LONG, LONG * 4]) == [False, False, True]
    block = theirs.blocks.sub_blocks["text_encoder"].init_pipeline()
    block.update_components(text_encoder=theirs.text_encoder, tokenizer=theirs.tokenizer)
    with torch.no_grad():
        expected = block(prompt=LONG * 4, max_sequence_length=flux_3.MAX_TOKENS, output="prompt_embeds")
    assert torch.allclose(encode_prompts(pipeline, [LONG * 4])["prompt_embeds"], expected, atol=1e-5)


def test_layers_of_reference_images_alone_are_not_trained(tiny: Callable[[str], Path]) -> None:
    pipeline, family = load_pipeline(str(tiny(NAME))), FAMILIES[NAME]
    transformer = pipeline.transformer.requires_grad_(True)
    conditions = encode_prompts(pipeline, ["a small red circle"])
    latents, told = torch.randn(1, 16, 4, 4), torch.tensor([500.0])
    family.denoise(family.model(pipeline), latents, told, conditions).square().mean().backward()
    unused = family.unused_layers(transformer)
    without = {name for name, parameter in transformer.named_parameters() if parameter.grad is None}
    assert without == {name for name in without if name.rpartition(".")[0] in unused} and len(without) >= 9
    assert len(without) == len(unused)


def test_bf16_rounds_the_noise_level_as_the_pipeline_does(tiny: Callable[[str], Path]) -> None:
    """0.9123 arrives as 0.9141 of bf16, and then as 916."""
    pipeline, family = load_pipeline(str(tiny(NAME)), dtype=torch.bfloat16), FAMILIES[NAME]
    told: list[float] = []
    time = pipeline.transformer.time_proj
    time.register_forward_pre_hook(lambda _, inputs: told.append(float(inputs[0][0])))
    conditions = {
        name: each.to(torch.bfloat16) if each.is_floating_point() else each
        for name, each in encode_prompts(pipeline, ["red"]).items()
    }
    with torch.no_grad():
        latents = torch.zeros(1, 16, 4, 4, dtype=torch.bfloat16)
        family.denoise(family.model(pipeline), latents, torch.tensor([912.3]), conditions)
    assert told == [916.0, 0.0]
    norms = {name: p.dtype for name, p in pipeline.transformer.named_parameters() if ".norm_" in name}
    assert norms and set(norms.values()) == {torch.float32}
