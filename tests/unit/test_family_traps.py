"""What is easily got wrong in a family: each fact beside the family's own pipeline or worked out by hand."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ray_jobs.config import Config
from ray_jobs.diffusion.families import FAMILIES, family_of
from ray_jobs.diffusion.sampling import encode_pictures, encode_prompts
from ray_jobs.training.setup import build_model
from ray_jobs.weights.loading import LORA_WEIGHTS, load_pipeline
from ray_jobs.weights.saving import save_lora
from serving.engine.engine import Engine
from serving.request import Request, RequestError

Z_IMAGE, KLEIN, QWEN = "ZImagePipeline", "Flux2KleinPipeline", "QwenImagePipeline"
CAPTIONS = ["a small red circle", "a big blue cross and a very small purple square beside it"]


def loaded(tiny: Callable[[str], Path], name: str) -> Any:
    return load_pipeline(str(tiny(name)))


def latents(pipeline: Any, rows: int) -> torch.Tensor:
    shape = family_of(pipeline).codec.shape(pipeline.vae.config, 48, 64)
    return torch.randn(rows, *shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def predict(pipeline: Any, conditions: dict[str, torch.Tensor]) -> torch.Tensor:
    family, rows = family_of(pipeline), len(conditions["prompt_embeds"])
    timesteps = torch.full((rows,), 700.0)
    noisy = latents(pipeline, 1).expand(rows, -1, -1, -1)
    return family.denoise(family.model(pipeline), noisy, timesteps, conditions)


@pytest.mark.parametrize("name", [Z_IMAGE, QWEN])
def test_a_masked_caption_is_alone_what_it_is_beside_a_longer_one(
    tiny: Callable[[str], Path], name: str
) -> None:
    pipeline = loaded(tiny, name)
    both = encode_prompts(pipeline, CAPTIONS)
    spoilt = both["prompt_embeds"].clone()
    spoilt[~both["prompt_mask"]] = 7.0  # padding must not be read
    together = predict(pipeline, both | {"prompt_embeds": spoilt})
    for row in range(2):
        alone = {key: value[row : row + 1] for key, value in both.items()}
        assert torch.allclose(predict(pipeline, alone)[0], together[row], atol=1e-5)
    assert not torch.allclose(together[0], together[1], atol=1e-3)


@pytest.mark.parametrize("name", [Z_IMAGE, QWEN])
def test_padding_that_is_not_read_is_stored_as_zeros(tiny: Callable[[str], Path], name: str) -> None:
    both = encode_prompts(loaded(tiny, name), CAPTIONS)
    assert both["prompt_embeds"][both["prompt_mask"]].abs().min() > 0
    assert not both["prompt_embeds"][~both["prompt_mask"]].any()


def test_flux_2_attends_to_the_padding_of_its_captions(tiny: Callable[[str], Path]) -> None:
    pipeline = loaded(tiny, KLEIN)
    embeds = encode_prompts(pipeline, CAPTIONS[:1])["prompt_embeds"]
    trimmed = predict(pipeline, {"prompt_embeds": embeds[:, :64]})
    assert not torch.allclose(trimmed, predict(pipeline, {"prompt_embeds": embeds}), atol=1e-3)


@pytest.mark.parametrize("size", [(64, 64), (1024, 1024), (1040, 1024), (2048, 1024)])
@pytest.mark.parametrize("steps", [4, 28, 50])
def test_flux_2_shifts_by_tokens_and_steps_as_its_pipeline(size: tuple[int, int], steps: int) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

    height, width = size[0] // 16, size[1] // 16
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    FAMILIES[KLEIN].schedule.set_timesteps(scheduler, steps, (128, height, width), "cpu")
    mu = torch.tensor(compute_empirical_mu(height * width, steps))
    even = 1 - torch.arange(steps) / steps
    expected = mu.exp() / (mu.exp() + 1 / even - 1)
    assert torch.allclose(scheduler.sigmas[:-1], expected, atol=1e-6)


def test_flux_2_normalises_latents_by_its_autoencoders_batch_norm(tiny: Callable[[str], Path]) -> None:
    pipeline = loaded(tiny, KLEIN)
    pixels = torch.randint(0, 256, (1, 3, 48, 64), generator=torch.Generator().manual_seed(3))
    ours = encode_pictures(pipeline, pixels.to(torch.uint8), torch.zeros(1, 4, 6, 8))
    with torch.no_grad():
        theirs = pipeline._encode_vae_image(pixels / 127.5 - 1, generator=None)
    assert ours.shape == (1, 16, 3, 4)
    assert torch.allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "layer", "arrives"),
    [(KLEIN, "time_guidance_embed", 912.0), (QWEN, "time_text_embed.time_proj", 910.16)],
)
def test_a_timestep_of_half_precision_is_rounded_in_the_pipelines_order(
    tiny: Callable[[str], Path], name: str, layer: str, arrives: float
) -> None:
    """In the other order FLUX.2 would be told 916, and Qwen-Image 914.06."""
    pipeline, family, told = loaded(tiny, name), FAMILIES[name], []
    embeds = encode_prompts(pipeline, CAPTIONS[:1])
    denoiser = pipeline.transformer.to(torch.bfloat16)
    denoiser.get_submodule(layer).register_forward_pre_hook(lambda _, inputs: told.append(inputs[0]))
    embeds["prompt_embeds"] = embeds["prompt_embeds"].bfloat16()
    with torch.no_grad():
        noisy = latents(pipeline, 1).bfloat16()
        family.denoise({"transformer": denoiser}, noisy, torch.tensor([912.3]), embeds)
    factor = 1000 if name == QWEN else 1  # Qwen's layer multiplies by 1000 itself, in float32
    assert factor * float(told[0].float()) == pytest.approx(arrives, abs=0.01)


def trained(base: Path, **train: Any) -> tuple[Any, Any]:
    config = {
        "name": "trained",
        "data": {"source": "pictures", "resolution": 64},
        "model": {"base": str(base)},
        "search": {"learning_rates": [1e-3], "ladder": [2]},
        "train": train,
    }
    return build_model(Config.model_validate(config))


def loss(pipeline: Any, model: Any) -> torch.Tensor:
    conditions = encode_prompts(load_pipeline(pipeline.name_or_path), CAPTIONS)
    timesteps = torch.tensor([300.0, 800.0])
    return model.family.denoise(model.model, latents(pipeline, 2), timesteps, conditions).square().mean()


def test_what_does_not_reach_qwen_images_prediction_is_not_trained(tiny: Callable[[str], Path]) -> None:
    pipeline, model = trained(tiny(QWEN), method="full")
    loss(pipeline, model).backward()
    assert all(p.grad is not None and p.grad.any() for _, p in model.trained())
    frozen = {name for name, p in model.denoiser.named_parameters() if not p.requires_grad}
    model.denoiser.requires_grad_(True).zero_grad()
    loss(pipeline, model).backward()
    unused = {name for name, p in model.denoiser.named_parameters() if p.grad is None or not p.grad.any()}
    assert frozen == unused and len(unused) == 9


def test_an_adapter_of_qwen_images_captions_has_no_layer_that_is_never_trained(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    layers = ["to_q", "add_q_proj", "to_add_out", "net.2"]
    pipeline, model = trained(tiny(QWEN), lora={"target_modules": layers})
    for name, parameter in model.trained():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    loss(pipeline, model).backward()
    assert all(p.grad is not None and p.grad.any() for _, p in model.trained())
    save_lora(pipeline, model, dict(model.trained()), tmp_path)
    again = load_pipeline(str(tiny(QWEN)), tmp_path)
    assert (tmp_path / LORA_WEIGHTS).exists()
    conditions = encode_prompts(again, CAPTIONS)
    with torch.no_grad():
        timesteps = torch.tensor([300.0, 800.0])
        ours = model.family.denoise(model.model, latents(pipeline, 2), timesteps, conditions)
        theirs = model.family.denoise(model.family.model(again), latents(pipeline, 2), timesteps, conditions)
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_one_step_of_qwen_image_is_refused(tiny: Callable[[str], Path]) -> None:
    """Its schedule is stretched to end at 0.02, and one step would have to be both ends: 0 / 0."""
    engine = Engine(loaded(tiny, QWEN))
    with pytest.raises(RequestError, match="cannot sample in 1 steps; choose another number"):
        engine.submit(Request("a small red circle", 0, 1, 1.0, None, 64, 64))
