"""FLUX.1's "control LoRA": adapters that bring input channels for the latents of a control image."""

from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any, cast

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from cluster.storage import Storage
from ray_jobs.config import Config, ConfigError
from ray_jobs.data.control import check_control
from ray_jobs.data.feeding.dataset import Dataset
from ray_jobs.diffusion.families import FAMILIES
from ray_jobs.diffusion.families.control import CONTROL, CONTROL_ROWS
from ray_jobs.diffusion.families.flux import from_tokens
from ray_jobs.diffusion.finetuning import FineTuning
from ray_jobs.diffusion.objectives import Draws, FlowMatching, LossSettings
from ray_jobs.diffusion.protocols import Pipeline
from ray_jobs.diffusion.sampling import control_conditions, encode_prompts
from ray_jobs.evaluation.actor import BARE, Evaluator, Shown
from ray_jobs.evaluation.merged_adapters import MergedAdapters
from ray_jobs.pictures.reading import encode_png
from ray_jobs.planning.footprint import footprint
from ray_jobs.publishing.model_card import usage
from ray_jobs.publishing.pages import published_base
from ray_jobs.training.setup import build_model, build_pack, check_settings, exporter
from ray_jobs.weights.loading import LORA_WEIGHTS, load_lora, load_pipeline, unload_lora
from ray_jobs.weights.starting_adapter import with_form_of_adapter
from tests.controlled import (
    GUIDANCE,
    PROMPT,
    SEED,
    SIDE,
    STEPS,
    as_tensor,
    control_image,
    drawn,
    plain_drawn,
    pointed,
)
from tests.small_set import small_set
from tests.tiny_models import write

FLUX = FAMILIES["FluxPipeline"]


def settings(base: Path, **sections: dict[str, Any]) -> Config:
    given: dict[str, Any] = {
        "name": "edges",
        "data": {"source": "pictures", "resolution": SIDE, "control": {"kind": "edges"}},
        "model": {"base": str(base)},
        "train": {"method": "lora", "micro_batch_size": 2, "lora": {"rank": 4, "alpha": 4}},
        "search": {"learning_rates": [1e-4], "ladder": [2]},
    }
    return Config.model_validate(given | {name: given.get(name, {}) | own for name, own in sections.items()})


def plain(pipeline: Pipeline) -> Any:
    """Return diffusers' own pipeline for control images over a pipeline's components."""
    parts = signature(diffusers.FluxControlPipeline.__init__).parameters
    found = diffusers.FluxControlPipeline(
        **{name: each for name, each in pipeline.components.items() if name in parts}
    )
    found.set_progress_bar_config(disable=True)
    return found


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return small_set(Storage.open(str(tmp_path_factory.mktemp("set"))))


def write_control_lora(base: Path, folder: Path, seed: int) -> Path:
    """Write an adapter that follows control images, as a training does, with random weights."""
    config = settings(base)
    family, _ = check_settings(config)
    assert family is FLUX
    pipeline, model = build_model(config)
    generator = torch.Generator().manual_seed(seed)
    weights = {
        name: each.detach() + 0.2 * torch.randn(each.shape, generator=generator)
        for name, each in model.all_trained
    }
    exporter(config, pipeline, model, 0)(weights, folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write("FluxPipeline", tmp_path_factory.mktemp("flux") / "base")


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an adapter that follows control images, as a training writes it."""
    folder = write_control_lora(base, tmp_path_factory.mktemp("edges"), 1)
    assert [path.name for path in folder.iterdir()] == [LORA_WEIGHTS]
    return folder


@contextmanager
def recorded(transformer: torch.nn.Module) -> Iterator[list[tuple[torch.Tensor, ...]]]:
    """Record a transformer's inputs, timesteps and predictions."""
    calls: list[tuple[torch.Tensor, ...]] = []

    def record(_: object, given: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        calls.append((named["hidden_states"], named["timestep"], output[0]))

    hook = transformer.register_forward_hook(record, with_kwargs=True)
    yield calls
    hook.remove()


def test_it_begins_as_the_base_and_draws_as_it_without_a_control_image(base: Path) -> None:
    plainly = drawn(load_pipeline(str(base)), None)
    pipeline, model = build_model(settings(base))
    shapes = {name: tuple(each.shape) for name, each in model.all_trained if "x_embedder" in name}
    assert shapes == {
        "denoiser.x_embedder.lora_A.default.weight": (4, 32),
        "denoiser.x_embedder.lora_B.default.weight": (32, 4),
    }
    assert FLUX.is_controlled(FLUX.model(pipeline))
    whole = load_pipeline(str(base))
    FLUX.control_channels.add_to(whole.transformer)  # type: ignore[union-attr]
    assert torch.equal(drawn(whole, None), plainly)
    beginning = drawn(whole, control_image())  # from the second noise of its seed
    FLUX.control_channels.take_from(whole.transformer)  # type: ignore[union-attr]
    assert not FLUX.is_controlled(FLUX.model(whole)) and torch.equal(drawn(whole, None), plainly)
    assert not torch.equal(beginning, plainly)


@pytest.mark.parametrize("family", ["FluxPipeline"])
def test_plain_diffusers_reads_it_and_draws_the_same_picture(base: Path, trained: Path, family: str) -> None:
    assert FLUX.pipeline_class == family
    ours = pointed(load_pipeline(str(base), trained))
    picture = drawn(ours, control_image()).permute(1, 2, 0).float()
    for name in ("FluxControlPipeline", "FluxPipeline"):
        read = pointed(getattr(diffusers, name).from_pretrained(base))
        read.load_lora_weights(trained)
        theirs = 255 * torch.from_numpy(plain_drawn(plain(read)))
        assert (picture - theirs).abs().max() < 0.55
    without = drawn(ours, np.zeros_like(control_image())).permute(1, 2, 0).float()
    assert (picture - without).abs().mean() > 1


def test_the_loss_is_that_of_the_pipelines_own_pieces(base: Path, trained: Path) -> None:
    pipeline = pointed(load_pipeline(str(base), trained))
    with recorded(pipeline.transformer) as calls:
        plain_drawn(plain(pipeline), guidance_scale=1.0)
    tokens, share, predicted = calls[1]
    grid = (SIDE // 16, SIDE // 16)
    noisy, sigma = from_tokens(tokens[..., :16], grid), share.reshape(1)
    noise = torch.randn(noisy.shape, generator=torch.Generator().manual_seed(1))
    objective = FLUX.schedule.objective(pipeline.scheduler.config)
    assert isinstance(objective, FlowMatching)
    clean = (noisy - sigma * noise) / (1 - sigma)
    position = sigma / (objective.shift - (objective.shift - 1) * sigma)
    expected = (from_tokens(predicted, grid) - (noise - clean)).square().mean()
    model = FineTuning(pipeline, FLUX, objective, LossSettings(timestep_sampling="uniform")).eval()
    conditions = encode_prompts(pipeline, [PROMPT])
    with torch.no_grad():
        given = control_conditions(pipeline, as_tensor(control_image())[None])
        loss = model(clean, conditions | given, Draws(position, noise))
        without = model(clean, conditions, Draws(position, noise))
    assert torch.allclose(loss[0], expected, rtol=1e-4)
    assert not torch.allclose(loss, without, rtol=1e-3)


def test_every_layer_that_is_trained_learns(base: Path) -> None:
    pipeline, model = build_model(settings(base))
    generator = torch.Generator().manual_seed(2)
    for _, each in model.all_trained:
        each.data += 0.1 * torch.randn(each.shape, generator=generator)
    latents = torch.randn(2, *FLUX.codec.shape(pipeline.vae.config, SIDE, SIDE), generator=generator)
    whole = load_pipeline(str(base))
    conditions = encode_prompts(whole, 2 * [PROMPT])
    conditions |= control_conditions(whole, as_tensor(control_image()).expand(2, -1, -1, -1))
    model(latents, conditions, Draws(torch.tensor([0.3, 0.7]), torch.randn_like(latents))).sum().backward()
    learning = {name for name, each in model.named_parameters() if each.grad is not None and each.grad.any()}
    assert learning == {name for name, _ in model.all_trained}
    down = dict(model.all_trained)["denoiser.x_embedder.lora_A.default.weight"].grad
    assert down is not None and down[:, 16:].any()


@pytest.mark.parametrize(
    ("lora", "quantize"),
    [
        ({"use_dora": True}, None),
        ({"kind": "loha"}, None),
        ({"kind": "lokr", "factor": 4, "rank": 2}, None),
        ({}, "nf4"),
    ],
)
def test_adapters_of_every_kind_are_read_as_they_were_trained(
    base: Path, tmp_path: Path, lora: dict[str, Any], quantize: str | None
) -> None:
    config = settings(
        base,
        model={"base": str(base), "quantize": quantize},
        train={"method": "lora", "precision": "fp32", "lora": {"rank": 4, "alpha": 4} | lora},
    )
    pipeline, model = build_model(config)
    generator = torch.Generator().manual_seed(3)
    for _, each in model.all_trained:
        each.data += 0.1 * torch.randn(each.shape, generator=generator)
    exporter(config, pipeline, model, 0)({name: each.detach() for name, each in model.all_trained}, tmp_path)
    read = load_pipeline(str(base), tmp_path, quantization=quantize)
    latents = torch.randn(1, *FLUX.codec.shape(read.vae.config, SIDE, SIDE), generator=generator)
    conditions = encode_prompts(read, [PROMPT])
    conditions |= control_conditions(read, as_tensor(control_image())[None])
    inputs = latents, torch.tensor([500.0]), conditions
    with torch.no_grad():
        trained = FLUX.denoise(model.eval().model, *inputs)
        assert torch.allclose(FLUX.denoise(FLUX.model(read), *inputs), trained, atol=1e-4)
    unload_lora(read)
    assert not FLUX.is_controlled(FLUX.model(read))


def test_adapters_that_follow_control_images_are_trained_together(base: Path) -> None:
    configs = [settings(base, search={"learning_rates": [rate], "ladder": [2]}) for rate in (1e-4, 2e-4)]
    _, pack = build_pack(configs)
    for member in pack.members.values():
        names = [name for name, _ in member.all_trained if "x_embedder" in name]
        assert len(names) == 2


def test_training_goes_on_from_it(base: Path, trained: Path) -> None:
    model = {"base": str(base), "adapter": str(trained)}
    config = with_form_of_adapter(settings(base, model=model))
    check_settings(config)
    _, resumed = build_model(config)
    stored = load_file(trained / LORA_WEIGHTS)
    name = "x_embedder.lora_A"
    [there] = [each for key, each in resumed.all_trained if name in key]
    assert torch.equal(there, stored[f"transformer.{name}.weight"])
    with pytest.raises(ValueError, match="x_embedder"):  # its channels are of what the rows do not have
        check_settings(settings(base, model=model, data={"control": {}}))


def test_an_adapter_without_the_channels_is_refused_as_a_beginning(base: Path, tmp_path: Path) -> None:
    config = settings(base, data={"control": {}})
    pipeline, model = build_model(config)
    exporter(config, pipeline, model, 0)({name: each.detach() for name, each in model.all_trained}, tmp_path)
    with pytest.raises(ValueError, match=r"model\.adapter: .*follows no control images.*x_embedder"):
        check_settings(settings(base, model={"base": str(base), "adapter": str(tmp_path)}))


def test_taken_away_it_leaves_the_base_as_it_was(base: Path, trained: Path, tmp_path: Path) -> None:
    """As evaluators use one base for adapters with and without the channels."""
    config = settings(base, data={"control": {}})
    pipeline, model = build_model(config)
    exporter(config, pipeline, model, 0)({n: each.detach() + 0.1 for n, each in model.all_trained}, tmp_path)
    expected = drawn(load_pipeline(str(base), tmp_path), None)
    whole = load_pipeline(str(base))
    before = {name: each.clone() for name, each in whole.transformer.state_dict().items()}
    followed = None
    for merges in (False, True):
        load_lora(whole, trained)
        merged = MergedAdapters(whole) if merges else None
        picture = drawn(whole, control_image())
        assert followed is None or (picture.float() - followed.float()).abs().max() <= 1
        followed = picture
        if merged:
            merged.undo()
        unload_lora(whole)
        after = whole.transformer.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(each, after[name]) for name, each in before.items())
        load_lora(whole, tmp_path)
        assert torch.equal(drawn(whole, None), expected)
        unload_lora(whole)


def test_evaluators_draw_with_it_and_the_base_without(base: Path, trained: Path, small: Dataset) -> None:
    evaluate = {"inference_steps": STEPS, "guidance_scale": GUIDANCE, "precision": "fp32"}
    evaluator = Evaluator(settings(base, evaluate=evaluate), small, 1)
    png = encode_png(control_image())

    def scored(weights: str | None) -> torch.Tensor:
        rows = [Shown([], png, control=png)]
        [batch] = evaluator._sample(weights, [PROMPT], [SEED], [(SIDE, SIDE)], None, rows, [0])
        return batch[0]

    before, followed = scored(BARE), scored(str(trained))
    assert torch.equal(scored(None), before) and torch.equal(before, drawn(load_pipeline(str(base)), None))
    assert torch.equal(scored(str(trained)), followed)
    alone = drawn(load_pipeline(str(base), trained), control_image())
    assert (followed.int() - alone.int()).abs().max() <= 1


def test_rows_without_a_control_image_draw_as_if_it_were_black_in_latents(base: Path, trained: Path) -> None:
    pipeline = load_pipeline(str(base), trained)
    latents = torch.randn(3, *FLUX.codec.shape(pipeline.vae.config, SIDE, SIDE))
    timesteps = torch.full((3,), 500.0)
    embeds = encode_prompts(pipeline, [PROMPT])
    conditions = {name: each.expand(3, *each.shape[1:]) for name, each in embeds.items()}
    given = control_conditions(pipeline, as_tensor(control_image()).expand(2, -1, -1, -1))
    rows, model = torch.tensor([2, 1]), FLUX.model(pipeline)
    with torch.no_grad():
        none = FLUX.denoise(model, latents, timesteps, conditions)
        some = FLUX.denoise(model, latents, timesteps, conditions | given | {CONTROL_ROWS: rows})
        every = FLUX.denoise(
            model, latents, timesteps, conditions | {CONTROL: given[CONTROL][:1].expand(3, -1, -1, -1)}
        )
    assert torch.equal(some[0], none[0]) and torch.equal(some[1:], every[1:])
    assert not torch.allclose(some[1:], none[1:], atol=1e-3)


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_a_plan_counts_the_channels(base: Path, quantize: str | None) -> None:
    config = settings(base, model={"base": str(base), "quantize": quantize})
    found = footprint(config)
    _, model = build_model(config)
    assert found.trained == sum(each.numel() for _, each in model.all_trained)
    without = footprint(settings(base, data={"control": {}}, model=cast(Any, config.model.model_dump())))
    assert found.base + found.trained > without.base + without.trained


def test_the_card_has_a_program_that_draws_for_a_control_image(
    base: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(base, evaluate={"inference_steps": 2})
    program = usage(config, published_base(config), PROMPT, {"guidance_scale": GUIDANCE})
    assert "pipeline = FluxControlPipeline.from_pretrained('base', " in program
    (tmp_path / "base").symlink_to(base)
    (tmp_path / LORA_WEIGHTS).symlink_to(trained / LORA_WEIGHTS)
    Image.fromarray(control_image()).save(tmp_path / "control.png")
    monkeypatch.chdir(tmp_path)
    exec(program, {})
    assert Image.open("picture.png").size == (SIDE, SIDE)


def test_what_cannot_follow_control_images_is_named(base: Path, tmp_path: Path) -> None:
    check_control(settings(base))
    other = write("StableDiffusionPipeline", tmp_path / "other")
    with pytest.raises(ConfigError, match=r"data\.control\.kind: .*method: lora; set that to controlnet"):
        check_control(settings(other))
    with pytest.raises(ValueError, match="adapters of StableDiffusionPipeline .*those of FluxPipeline"):
        check_settings(settings(other))
    with pytest.raises(ConfigError, match=r"train\.method: full; set that to controlnet"):
        check_control(settings(base, train={"method": "full"}))
    with pytest.raises(ValueError, match=r"train\.lora\.kind: oft .*control images"):
        settings(base, train={"lora": {"kind": "oft"}})
    with pytest.raises(ValueError, match="votes are on images without references, masks or control images"):
        settings(base, train={"preference": {"votes": ["votes"]}})
