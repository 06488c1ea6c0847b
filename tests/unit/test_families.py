"""Each family encodes, denoises and draws as its pipeline in diffusers does, and can be trained."""

import inspect
import re
from collections.abc import Callable
from copy import deepcopy
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch

from ray_jobs.diffusion.families import FAMILIES, Conditions, family_of
from ray_jobs.diffusion.families.codec import per_channel
from ray_jobs.diffusion.families.family import NEXT_TIMESTEP
from ray_jobs.diffusion.families.noise_schedule import RectifiedFlow
from ray_jobs.diffusion.finetuning import FineTuning, add_lora
from ray_jobs.diffusion.objectives import Diffusion, Draws, FlowMatching, LossSettings
from ray_jobs.diffusion.recomputation import EveryNth
from ray_jobs.diffusion.sampling import (
    decode_latents,
    encode_masked,
    encode_prompts,
    initial_noise,
    null_captions,
    sample_latents,
    seeded,
    whole_pictures,
)
from ray_jobs.weights.loading import LORA_WEIGHTS, load_pipeline
from ray_jobs.weights.saving import write_adapter
from tests.serving import plain_diffusers
from tests.tiny_models import BY_NAME, MODELS, guidance

PIPELINE = re.compile(r'pipeline_class = "(\w+)"')
PROMPTS = ["a small red circle", "a big blue cross"]
HEIGHT, WIDTH = 64, 96  # pixels


@pytest.fixture(params=MODELS)
def folder(request: pytest.FixtureRequest, tiny: Callable[[str], Path]) -> Path:
    return tiny(request.param)


@torch.no_grad()
def encoded_by_diffusers(pipeline: Any) -> dict[str, torch.Tensor]:
    """What the pipeline's own `encode_prompt` makes of the prompts, by our names."""
    kind = type(pipeline).__name__
    if kind == "StableDiffusionPipeline":
        embeds, _ = pipeline.encode_prompt(PROMPTS, "cpu", 1, do_classifier_free_guidance=False)
        return {"prompt_embeds": embeds}
    if kind == "ChromaPipeline":
        embeds, _, mask, *_ = pipeline.encode_prompt(PROMPTS, do_classifier_free_guidance=False)
        return {"prompt_embeds": embeds, "prompt_mask": mask.bool()}
    if kind == "SanaPipeline":
        instruction = inspect.signature(pipeline.__call__).parameters["complex_human_instruction"].default
        embeds, mask, _, _ = pipeline.encode_prompt(PROMPTS, False, complex_human_instruction=instruction)
        return {"prompt_embeds": embeds * mask[..., None], "prompt_mask": mask.bool()}
    if kind == "Lumina2Pipeline":
        embeds, mask, _, _ = pipeline.encode_prompt(PROMPTS, False)
        return {"prompt_embeds": embeds * mask[..., None], "prompt_mask": mask.bool()}
    if kind == "PixArtSigmaPipeline":
        embeds, mask, _, _ = pipeline.encode_prompt(PROMPTS, False)
        return {"prompt_embeds": embeds * mask[..., None], "prompt_mask": mask.bool()}
    if kind == "AuraFlowPipeline":
        return {"prompt_embeds": pipeline.encode_prompt(PROMPTS, do_classifier_free_guidance=False)[0]}
    if kind == "ZImagePipeline":
        return _padded(pipeline.encode_prompt(list(PROMPTS), do_classifier_free_guidance=False)[0], 512)
    if kind == "Ideogram4Pipeline":  # words, of which there are 3 kinds of tokens, are on the left
        embeds, _, _, roles = pipeline.encode_prompt(PROMPTS, 4, 6, 128, torch.device("cpu"))
        return _padded([row[role == 3] for row, role in zip(embeds, roles, strict=True)], 1024)
    if kind == "Krea2Pipeline":  # it pads before the template's end
        embeds, mask = pipeline.encode_prompt(PROMPTS)
        return _padded([row[real] for row, real in zip(embeds, mask, strict=True)], 512)
    if kind in ("QwenImagePipeline", "QwenImageEditPlusPipeline"):
        embeds, mask = pipeline.encode_prompt(PROMPTS, max_sequence_length=512)
        counts = [embeds.shape[1]] * 2 if mask is None else mask.sum(dim=1).tolist()
        return _padded([row[:count] for row, count in zip(embeds, counts, strict=True)], 512)
    if kind == "QwenImage21Pipeline":
        embeds, mask, _ = pipeline.encode_prompt(PROMPTS)
        counts = [embeds.shape[1]] * 2 if mask is None else mask.sum(dim=1).tolist()
        return _padded([row[:count] for row, count in zip(embeds, counts, strict=True)], 1024)
    if kind == "HiDreamImagePipeline":
        t5, _, llama, _, pooled, _ = pipeline.encode_prompt(PROMPTS, do_classifier_free_guidance=False)
        return {"prompt_embeds": t5, "pooled_prompt_embeds": pooled, "llama_embeds": llama.transpose(0, 1)}
    if kind in ("Flux2KleinPipeline", "Flux2Pipeline"):
        return {"prompt_embeds": pipeline.encode_prompt(PROMPTS)[0]}
    if kind in ("Flux3ModularPipeline", "Flux3DistilledModularPipeline"):
        block = pipeline.blocks.sub_blocks["text_encoder"].init_pipeline()
        block.update_components(text_encoder=pipeline.text_encoder, tokenizer=pipeline.tokenizer)
        return _padded([block(prompt=prompt, output="prompt_embeds")[0] for prompt in PROMPTS], 640)
    if kind in ("FluxPipeline", "FluxKontextPipeline", "FluxFillPipeline"):
        embeds, pooled, _ = pipeline.encode_prompt(PROMPTS)
    elif kind == "StableDiffusion3Pipeline":
        embeds, _, pooled, _ = pipeline.encode_prompt(PROMPTS, None, None, do_classifier_free_guidance=False)
    else:
        embeds, _, pooled, _ = pipeline.encode_prompt(PROMPTS, do_classifier_free_guidance=False)
    return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}


def _padded(states: list[torch.Tensor], length: int) -> dict[str, torch.Tensor]:
    """Captions of several lengths with zeros at their ends, and the mask of what they had."""
    padded = [each.new_zeros(length, *each.shape[1:]) for each in states]
    for row, each in zip(padded, states, strict=True):
        row[: len(each)] = each
    mask = [torch.arange(length) < len(each) for each in states]
    return {"prompt_embeds": torch.stack(padded), "prompt_mask": torch.stack(mask)}


def noise(pipeline: Any) -> torch.Tensor:
    return initial_noise(seeded([3, 4]), family_of(pipeline).codec.shape(pipeline.vae.config, HEIGHT, WIDTH))


def given(pipeline: Any) -> Conditions:
    """The conditions besides captions; of families that paint masks, all of each picture is painted."""
    family = family_of(pipeline)
    found = whole_pictures(family, 2, HEIGHT, WIDTH)
    if family.paints_masks:
        latents = noise(pipeline)
        further = initial_noise(seeded(range(2)), tuple(latents.shape[1:]))
        found |= encode_masked(pipeline, torch.zeros((2, 4, HEIGHT, WIDTH), dtype=torch.uint8), further)
    return found


def without_caption(pipeline: Any) -> dict[str, torch.Tensor]:
    """What guidance leads away from: an empty caption, or none where another network predicts without."""
    if family_of(pipeline).helpers:
        return null_captions(pipeline)
    return encode_prompts(pipeline, [""], negative=True)


def predict(pipeline: Any, **more: torch.Tensor) -> torch.Tensor:
    """One step's prediction for the prompts, with further conditions."""
    family = family_of(pipeline)
    conditions = encode_prompts(pipeline, PROMPTS) | given(pipeline) | more
    return family.denoise(family.model(pipeline), noise(pipeline), torch.tensor([100, 900]), conditions)


def test_prompts_are_encoded_as_by_the_pipeline_itself(folder: Path) -> None:
    pipeline = load_pipeline(str(folder))
    ours, theirs = encode_prompts(pipeline, PROMPTS), encoded_by_diffusers(plain_diffusers.load(folder))
    assert ours.keys() == theirs.keys() == set(family_of(pipeline).text.embeds)
    for name, expected in theirs.items():
        # Without T5 the pipeline has zeros after and beside CLIP's, which ours gets when it denoises.
        places = tuple(slice(size) for size in ours[name].shape)
        assert torch.allclose(ours[name], expected[places], atol=1e-5)
        rest = expected.clone()
        rest[places] = 0
        assert not rest.any()
        assert "without" in folder.name or ours[name].shape == expected.shape


@pytest.mark.parametrize("guidance_scale", [1.5, 4.0])
def test_a_picture_is_that_of_the_plain_pipeline(folder: Path, guidance_scale: float) -> None:
    pipeline, theirs = load_pipeline(str(folder)), plain_diffusers.load(folder)
    family = family_of(pipeline)
    denoiser = getattr(pipeline, family.denoiser)
    embedded = family.guidance_embedded(denoiser)
    latents = sample_latents(
        family,
        family.model(pipeline),
        pipeline.scheduler,
        noise(pipeline),
        encode_prompts(pipeline, PROMPTS) | given(pipeline),
        None if embedded else without_caption(pipeline),
        num_steps=4,
        guidance_scale=guidance(pipeline, guidance_scale),
    )
    plain_diffusers.keep_size(theirs, HEIGHT, WIDTH)
    options: dict[str, Any] = {"num_inference_steps": 4, "height": HEIGHT, "width": WIDTH}
    options |= {"latents": _for_diffusers(theirs, noise(pipeline))}
    options |= {} if embedded or family.helpers else {"negative_prompt": ["", ""]}
    options |= family.guidance_arguments(denoiser.config, guidance_scale)
    if "negative_prompt" in options:
        options["negative_prompt"] = ["", ""]
    options = plain_diffusers.known(theirs, options)
    # Copies: Z-Image's pipeline writes its template into the lists of prompts.
    expected = theirs(prompt=list(PROMPTS), output_type="latent", **deepcopy(options)).images
    assert torch.allclose(latents, _from_diffusers(theirs, family, expected), atol=1e-4)
    pixels = theirs(prompt=list(PROMPTS), output_type="pt", **deepcopy(options)).images
    expected = 255 * plain_diffusers.on_white(pixels)
    assert (decode_latents(pipeline, latents) - expected).abs().max() < 0.5 + 255e-4


def _for_diffusers(theirs: Any, latents: torch.Tensor, rows: int = 2) -> torch.Tensor:
    """The latents as the pipeline takes them: those of some as tokens."""
    if type(theirs).__name__ == "Ideogram4Pipeline":
        return latents.flatten(2).transpose(1, 2)
    if not hasattr(theirs, "_unpack_latents"):
        return latents
    tokens: torch.Tensor = theirs._pack_latents(latents, rows, 4, *latents.shape[-2:])
    return tokens


def _from_diffusers(theirs: Any, family: Any, latents: torch.Tensor) -> torch.Tensor:
    """The latents that the pipeline returns, in the form that its denoiser works on."""
    if hasattr(theirs, "_unpack_latents"):
        side = theirs.vae_scale_factor
        factor = (side,) if "vae_scale_factor" in signature(theirs._unpack_latents).parameters else ()
        unpacked: torch.Tensor = theirs._unpack_latents(latents, HEIGHT, WIDTH, *factor)
        return unpacked.reshape(2, 4, HEIGHT // side, WIDTH // side)
    if type(theirs).__name__ == "Flux2KleinPipeline":  # as the autoencoder decodes them
        shift, scale = (per_channel(part, latents) for part in family.codec.scale(theirs.vae))
        return (family.codec.pack(latents) - shift) * scale
    if type(theirs).__name__ in ("Flux2Pipeline", "Ideogram4Pipeline"):
        return latents.transpose(1, 2).unflatten(2, (HEIGHT // 16, WIDTH // 16))
    return latents


@pytest.mark.parametrize(
    "name", [name for name in MODELS if isinstance(BY_NAME[name][0].schedule, RectifiedFlow)]
)
def test_the_loss_is_that_of_the_pipelines_own_pieces(tiny: Callable[[str], Path], name: str) -> None:
    """Of a step of the pipeline: what its scheduler receives is the target's."""
    pipeline, theirs = load_pipeline(str(tiny(name))), plain_diffusers.load(tiny(name))
    family, steps = family_of(pipeline), plain_diffusers.recorded_steps(theirs)
    plain_diffusers.keep_size(theirs, HEIGHT, WIDTH)
    options: dict[str, Any] = {"num_inference_steps": 4, "height": HEIGHT, "width": WIDTH}
    options |= family.guidance_arguments(getattr(pipeline, family.denoiser).config, 1.0)
    options |= {"latents": _for_diffusers(theirs, noise(pipeline)), "output_type": "latent"}
    if "negative_prompt" in options:
        options["negative_prompt"] = ["", ""]
    theirs(prompt=list(PROMPTS), **plain_diffusers.known(theirs, options))
    # A pipeline of one prompt a call took the first prompt's four steps first.
    output, timestep, sample = (torch.stack(each) for each in zip(*steps[2::4], strict=True))
    output, timestep, sample = output.flatten(0, 1), timestep[0], sample.flatten(0, 1)
    sigma, drawn = timestep / 1000, noise(pipeline).flip(-1)
    straight = in_steps(theirs, drawn)
    clean = (sample - sigma * straight) / (1 - sigma)
    expected = (output - (straight - clean)).square().flatten(1).mean(dim=1)

    objective = family.schedule.objective(pipeline.scheduler.config)
    assert isinstance(objective, FlowMatching)
    model = FineTuning(pipeline, family, objective, LossSettings(timestep_sampling="uniform"))
    position = sigma / (objective.shift - (objective.shift - 1) * sigma)
    draws = Draws(position.float().expand(2), drawn)
    conditions = encode_prompts(pipeline, PROMPTS) | given(pipeline)
    if family.takes_next_timestep(getattr(pipeline, family.denoiser)):
        conditions[NEXT_TIMESTEP] = steps[3][1].expand(2)
    with torch.no_grad():
        loss = model(of_steps(theirs, clean, drawn.shape), conditions, draws)
    assert torch.allclose(loss, expected, rtol=1e-4)
    assert not torch.allclose(loss[0], loss[1], rtol=1e-2)


def in_steps(theirs: Any, latents: torch.Tensor, rows: int = 2) -> torch.Tensor:
    """The latents as the pipeline's scheduler receives them."""
    if type(theirs).__name__.startswith(("Flux2", "Flux3")):
        return latents.flatten(2).transpose(1, 2)
    return _for_diffusers(theirs, latents, rows)


def of_steps(theirs: Any, latents: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Inverse of `in_steps`."""
    if latents.shape == shape:
        return latents
    if latents.shape[1] == shape[-2] * shape[-1]:
        return latents.transpose(1, 2).unflatten(2, shape[-2:])
    patches = latents.transpose(1, 2).unflatten(2, [side // 2 for side in shape[-2:]])
    return torch.nn.functional.pixel_shuffle(patches, 2)


def test_every_row_has_its_own_guidance(folder: Path) -> None:
    pipeline = load_pipeline(str(folder))
    family = family_of(pipeline)

    def draw(guidance_scale: float | torch.Tensor) -> torch.Tensor:
        return sample_latents(
            family,
            family.model(pipeline),
            pipeline.scheduler,
            noise(pipeline),
            encode_prompts(pipeline, PROMPTS) | given(pipeline),
            without_caption(pipeline),
            num_steps=2,
            guidance_scale=guidance_scale,
        )

    low, high, mixed = draw(1.0), draw(9.0), draw(torch.tensor([1.0, 9.0]))
    # Relative to the largest: from pure noise, PixArt's schedule enlarges the prediction 150 times.
    expected = torch.stack([low[0], high[1]])
    assert torch.allclose(mixed, expected, rtol=0, atol=max(1e-5, 1e-6 * float(expected.abs().max())))
    assert not torch.allclose(low, high, atol=1e-3)


def test_gradients_reach_the_denoiser_and_the_trainable_text_encoders(folder: Path) -> None:
    pipeline = load_pipeline(str(folder))
    family = family_of(pipeline)
    trained = [getattr(pipeline, name) for name in family.trainable]
    for part in trained:
        part.requires_grad_(True)
    texts = [family.text.as_prompt(prompt) for prompt in PROMPTS]
    captions = family.text.embed(family.text.present(pipeline), family.text.tokenize(pipeline, texts))
    conditions = captions | given(pipeline)
    predicted = family.denoise(family.model(pipeline), noise(pipeline), torch.tensor([100, 900]), conditions)
    assert predicted.shape == noise(pipeline).shape
    predicted.square().mean().backward()
    for part in trained:
        assert any(p.grad is not None and p.grad.any() for p in part.parameters())


@pytest.mark.parametrize("every", [1, 2])
def test_recomputed_activations_change_neither_prediction_nor_gradients(folder: Path, every: int) -> None:
    found, functions = [], list[EveryNth]()
    for recompute in (False, True):
        pipeline = load_pipeline(str(folder))
        family = family_of(pipeline)
        parts = {name: getattr(pipeline, name) for name in family.denoisers}
        for denoiser in parts.values():
            denoiser.requires_grad_(True).train()
            if recompute:
                functions.append(EveryNth(every))
                family.enable_gradient_checkpointing(denoiser, functions[-1])
        predicted = predict(pipeline)
        predicted.square().mean().backward()
        parameters = [p for part in parts.values() for p in part.parameters()]
        found.append([predicted, *(p.grad for p in parameters if p.grad is not None)])
    assert len(found[0]) > 10
    for plain, recomputed in zip(*found, strict=True):
        assert torch.allclose(plain, recomputed, atol=1e-6)
    for denoiser, function in zip(parts.values(), functions, strict=True):
        blocks = {getattr(block, "__self__", block) for block in function.numbers}  # or its `forward`
        assert blocks == set(family.recomputed_blocks(denoiser))


def test_all_that_is_loaded_is_frozen(folder: Path) -> None:
    pipeline = load_pipeline(str(folder))
    modules = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    assert len(modules) >= 3
    assert not any(module.training for module in modules)
    assert not any(p.requires_grad for module in modules for p in module.parameters())


def test_adapters_of_all_that_can_be_trained_are_loaded(folder: Path, tmp_path: Path) -> None:
    trained = load_pipeline(str(folder))
    add_adapters(trained)
    save_adapters(trained, tmp_path)
    loaded = load_pipeline(str(folder), tmp_path)
    with torch.no_grad():
        expected = predict(trained)
        assert torch.allclose(predict(loaded), expected, atol=1e-5)
        assert not torch.allclose(predict(load_pipeline(str(folder))), expected, atol=1e-3)


def test_adapters_of_layers_that_the_model_does_not_have_are_refused(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    trained = load_pipeline(str(folder))
    add_adapters(trained)
    save_adapters(trained, tmp_path)
    stored = load_file(tmp_path / LORA_WEIGHTS)
    for part in family_of(trained).trainable:
        layer = next(name for name in stored if name.startswith(f"{part}.")).split(".lora_")[0]
        other = {name.replace(f"{layer}.", f"{layer}_elsewhere."): value for name, value in stored.items()}
        save_file(other, tmp_path / LORA_WEIGHTS)
        with pytest.raises(
            ValueError, match=f"{len(stored) - 2} of {len(stored)} tensors fit the base model"
        ):
            load_pipeline(str(folder), tmp_path)


def add_adapters(pipeline: Any) -> None:
    """LoRA with random weights on the denoiser and on the text encoders that can be trained."""
    family = family_of(pipeline)
    torch.manual_seed(1)
    for name, layers in family.trainable.items():
        part = getattr(pipeline, name)
        add_lora(part, rank=2, alpha=2, dropout=0.0, target_modules=list(layers))
        for key, parameter in part.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(parameter, std=0.3)


def save_adapters(pipeline: Any, folder: Path) -> None:
    from peft.utils import get_peft_model_state_dict

    family = family_of(pipeline)
    layers = {name: get_peft_model_state_dict(getattr(pipeline, name)) for name in family.trainable}
    if family.has_lora_loader:
        named = {f"{name}_lora_layers": state for name, state in layers.items()}
        type(pipeline).save_lora_weights(folder, **named)
    else:
        write_adapter(folder, layers, {})


def test_the_sizes_change_what_stable_diffusion_xl_predicts(tiny_xl: Path) -> None:
    pipeline = load_pipeline(str(tiny_xl))
    with torch.no_grad():
        whole = predict(pipeline)
        for column in range(6):
            sizes = torch.tensor([[HEIGHT, WIDTH, 0, 0, HEIGHT, WIDTH]] * 2)
            sizes[0, column] += 500
            other = predict(pipeline, sizes=sizes)
            assert not torch.allclose(other[0], whole[0], atol=1e-4)
            assert torch.allclose(other[1], whole[1], atol=1e-6)


def test_guidance_is_one_unless_it_is_told(tiny_flux: Path) -> None:
    pipeline = load_pipeline(str(tiny_flux))
    with torch.no_grad():
        plain_step = predict(pipeline)
        assert torch.equal(predict(pipeline, guidance=torch.ones(2)), plain_step)
        assert not torch.allclose(predict(pipeline, guidance=torch.full((2,), 4.0)), plain_step, atol=1e-4)


def test_the_objective_is_that_of_the_models_scheduler(request: pytest.FixtureRequest) -> None:
    def objective(name: str) -> Any:
        pipeline = load_pipeline(str(request.getfixturevalue(name)))
        return family_of(pipeline).schedule.objective(pipeline.scheduler.config)

    diffusion = {name: objective(name) for name in ("tiny_model", "tiny_xl")}
    assert all(isinstance(each, Diffusion) for each in diffusion.values())
    assert diffusion["tiny_model"].prediction_type == "v_prediction"
    assert diffusion["tiny_xl"].prediction_type == "epsilon"
    flows = {name: objective(name) for name in ("tiny_sd3", "tiny_flux")}
    assert all(isinstance(each, FlowMatching) for each in flows.values())
    assert flows["tiny_sd3"].shift == 3.0
    assert flows["tiny_flux"].shift == 1.0


@pytest.mark.parametrize(
    "name", [name for name, family in FAMILIES.items() if isinstance(family.schedule, RectifiedFlow)]
)
def test_flow_matching_has_no_terminal_snr_to_correct(name: str) -> None:
    with pytest.raises(ValueError, match=r"train\.loss\.zero_terminal_snr: .*turn it off"):
        FAMILIES[name].schedule.objective({"shift": 1.0, "num_train_timesteps": 1000}, zero_terminal_snr=True)


@pytest.mark.parametrize("load", [family_of, None])
def test_a_pipeline_of_no_known_family_is_named(load: Callable[[str], Any] | None, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "DDPMPipeline"}')
    with pytest.raises(ValueError, match="model.base: DDPMPipeline is not supported, only AuraFlow"):
        load("DDPMPipeline") if load else load_pipeline(str(tmp_path))


NAMES = re.compile(r"\b(unet|transformer|text_encoder(_\d)?|block_out_channels)\b")


def test_only_families_name_the_components_of_their_models() -> None:
    """Else a new family would be more than one file."""
    root = Path(__file__).parents[2]
    files = [path for top in ("ray_jobs", "cluster", "serving") for path in (root / top).rglob("*.py")]
    inside = root / "ray_jobs" / "diffusion" / "families"
    named = {path for path in files if NAMES.search(path.read_text(encoding="utf-8"))}
    assert {path.name for path in named if path.is_relative_to(inside)} >= {"flux.py", "chroma.py"}
    assert not {path.relative_to(root).as_posix() for path in named if not path.is_relative_to(inside)}


def test_every_family_is_found_and_has_its_small_models() -> None:
    folder = Path(__file__).parents[2] / "ray_jobs" / "diffusion" / "families"
    written = {name for path in folder.glob("*.py") for name in PIPELINE.findall(path.read_text())}
    assert written == set(FAMILIES)
    assert all("" in family.variants for family in FAMILIES.values())


def test_the_layers_for_lora_are_all_of_a_denoisers_attention(folder: Path) -> None:
    pipeline = load_pipeline(str(folder))
    family = family_of(pipeline)
    denoiser = getattr(pipeline, family.denoiser)
    linear = {
        name
        for name, layer in denoiser.named_modules()
        if isinstance(layer, torch.nn.Linear) and re.search(r"\.(attn|attention\.)", name)
    }
    if "w1" in family.trainable[family.denoiser]:  # there also its feed-forward layers
        linear |= {name for name, _ in denoiser.named_modules() if re.search(r"feed_forward\.w[123]$", name)}
    if "add_q_proj" not in family.trainable[family.denoiser]:  # as diffusers' own training of this family
        linear = {name for name in linear if not re.search(r"\.(add_[qkv]_proj|to_add_out)$", name)}
    targets = family.trainable[family.denoiser]
    assert linear and linear == {name for name, _ in denoiser.named_modules() if name.endswith(targets)}


def test_an_autoencoder_that_keeps_state_between_calls_is_known(folder: Path) -> None:
    """Two threads that decode with one at a time would take each other's features."""
    pipeline = load_pipeline(str(folder))

    def state() -> list[tuple[str, str, object]]:
        return [
            (name, key, value if isinstance(value, int | float | str | bool | None) else id(value))
            for name, module in pipeline.vae.named_modules()
            for key, value in vars(module).items()
        ]

    before = state()
    latents = torch.zeros(1, *family_of(pipeline).codec.shape(pipeline.vae.config, 64, 64))
    decode_latents(pipeline, latents)
    assert (state() != before) == family_of(pipeline).codec.keeps_state
