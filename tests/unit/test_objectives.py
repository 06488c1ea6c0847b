"""The objective equals values computed by hand."""

import math
from pathlib import Path

import pytest
import torch

from ray_jobs.diffusion.ema import EMA
from ray_jobs.diffusion.finetuning import FineTuning, add_lora, save_weights
from ray_jobs.diffusion.loading import LORA_WEIGHTS, load_pipeline
from ray_jobs.diffusion.objectives import add_noise, denoising_loss, min_snr_weight, prediction_target

LATENT, NOISE, VARIANCE = 2.0, -1.0, 0.64  # sqrt(0.64) = 0.8, sqrt(0.36) = 0.6


def full(value: float) -> torch.Tensor:
    return torch.full((1, 1, 1, 1), value)


def test_noise_is_added_by_the_schedule() -> None:
    noisy = add_noise(full(LATENT), full(NOISE), torch.tensor([VARIANCE]))
    assert noisy.item() == pytest.approx(0.8 * 2 + 0.6 * -1)


@pytest.mark.parametrize(
    ("prediction_type", "expected"),
    [("epsilon", -1.0), ("sample", 2.0), ("v_prediction", 0.8 * -1 - 0.6 * 2)],
)
def test_the_loss_is_the_squared_error_of_the_prediction(prediction_type: str, expected: float) -> None:
    variance = torch.tensor([VARIANCE])
    target = prediction_target(prediction_type, full(LATENT), full(NOISE), variance)
    assert target.item() == pytest.approx(expected)
    loss = denoising_loss(
        lambda noisy, timesteps: noisy,  # predicts its input: 0.8 * 2 - 0.6 = 1.0
        full(LATENT),
        full(NOISE),
        torch.tensor([0]),
        variance,
        prediction_type=prediction_type,
    )
    assert loss.item() == pytest.approx((1.0 - expected) ** 2, rel=1e-5)


def test_min_snr_weights() -> None:
    variance = torch.tensor([0.5, 0.9])  # SNR 1 and 9
    assert min_snr_weight("epsilon", variance, 5).tolist() == pytest.approx([1.0, 5 / 9])
    assert min_snr_weight("v_prediction", variance, 5).tolist() == pytest.approx([0.5, 0.5])


def test_an_unknown_prediction_type_is_refused() -> None:
    with pytest.raises(ValueError, match="prediction_type 'noise'"):
        prediction_target("noise", full(0), full(0), torch.tensor([0.5]))


def test_ema_follows_with_its_decay() -> None:
    weight = torch.zeros(1)
    ema = EMA([("w", weight)], decay=0.5)
    ema.update([("w", weight + 1)], step=100)
    assert ema.averages["w"].item() == pytest.approx(0.5)
    ema.update([("w", weight + 1)], step=1)  # warm-up: (1 + 1) / (10 + 1)
    assert ema.averages["w"].item() == pytest.approx(1 - 0.5 * 2 / 11)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_both_methods_lower_the_loss_on_a_fixed_batch(tiny_model: Path, method: str) -> None:
    torch.manual_seed(0)
    pipeline = load_pipeline(str(tiny_model))
    if method == "lora":
        add_lora(
            pipeline.unet, rank=8, alpha=8, dropout=0.0, target_modules=["to_q", "to_k", "to_v", "conv1"]
        )
    else:
        pipeline.unet.requires_grad_(True)
    model = FineTuning(pipeline)
    unet = pipeline.unet.config
    latents = torch.randn(4, unet.in_channels, unet.sample_size, unet.sample_size)
    batch = (latents, torch.randn(4, 5, unet.cross_attention_dim), torch.randn_like(latents))
    timesteps = torch.tensor([100, 300, 600, 900])
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW([p for _, p in model.trained()], lr=3e-3)
    losses = []
    for _ in range(12):
        loss = model(*batch, timesteps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]
    now = dict(model.named_parameters())
    assert all(torch.equal(now[name], value) for name, value in frozen.items())


def test_saved_lora_weights_load_in_plain_diffusers_and_predict_the_same(
    tiny_model: Path, tmp_path: Path
) -> None:
    from diffusers import StableDiffusionPipeline

    torch.manual_seed(0)
    pipeline = load_pipeline(str(tiny_model))
    add_lora(
        pipeline.unet,
        rank=4,
        alpha=8,
        dropout=0.0,
        target_modules=["to_q", "to_out.0", "proj_in", "ff.net.2", "conv1"],
    )
    for parameter in pipeline.unet.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    save_weights(pipeline, "lora", tmp_path)
    plain = StableDiffusionPipeline.from_pretrained(tiny_model, safety_checker=None)
    config = plain.unet.config
    inputs = (torch.randn(1, config.in_channels, 8, 8), 10, torch.randn(1, 5, config.cross_attention_dim))
    with torch.no_grad():
        base = plain.unet(*inputs).sample
        plain.load_lora_weights(tmp_path)
        loaded, trained = plain.unet(*inputs).sample, pipeline.unet(*inputs).sample
    assert torch.allclose(loaded, trained, atol=1e-5)
    assert not math.isclose(float((base - trained).abs().max()), 0.0, abs_tol=1e-3)


def test_adapters_that_do_not_all_fit_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    pipeline = load_pipeline(str(tiny_model))
    add_lora(pipeline.unet, rank=2, alpha=2, dropout=0.0, target_modules=["to_q", "conv1"])
    save_weights(pipeline, "lora", tmp_path)
    stored = load_file(tmp_path / LORA_WEIGHTS)
    renamed = {name.replace("attn1.to_q", "attn3.to_q"): value for name, value in stored.items()}
    save_file(renamed, tmp_path / LORA_WEIGHTS)
    with pytest.raises(ValueError, match=f"of {len(stored)} tensors fit the base model"):
        load_pipeline(str(tiny_model), tmp_path)
