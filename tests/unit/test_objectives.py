"""The objectives and the losses equal values computed by hand, and diffusers' own."""

import math
from dataclasses import replace
from statistics import NormalDist
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from ray_jobs.diffusion.ema import EMA
from ray_jobs.diffusion.families.codec import Codec
from ray_jobs.diffusion.objectives import (
    Diffusion,
    Draws,
    FlowMatching,
    LossSettings,
    Objective,
    denoising_loss,
    density,
)

LATENT, NOISE = 2.0, -1.0
SCHEDULE = torch.tensor([0.9, 0.64, 0.5, 0.2])  # step 1: sqrt(0.64) = 0.8, sqrt(0.36) = 0.6
STEP_1 = torch.tensor([0.3])  # a position in its part, [0.25, 0.5)
PLAIN = LossSettings()
STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def full(value: float) -> Tensor:
    return torch.full((1, 1, 1, 1), value)


def draws(position: Tensor = STEP_1, **values: Tensor) -> Draws:
    return Draws(position, full(NOISE).expand(len(position), 1, 1, 1), **values)


def loss(objective: Objective, given: Draws, settings: LossSettings = PLAIN) -> list[float]:
    """Of a denoiser that predicts its input."""
    latents = full(LATENT).expand(len(given.position), 1, 1, 1)
    return denoising_loss(lambda noisy, _: noisy, objective, latents, given, settings).tolist()


def seen(objective: Objective, given: Draws, settings: LossSettings) -> tuple[float, float, float]:
    """What the denoiser is given for one picture (noisy latent, timestep), and the loss of predicting 0."""
    inputs: list[Tensor] = []

    def denoise(noisy: Tensor, timesteps: Tensor) -> Tensor:
        inputs.extend([noisy, timesteps])
        return torch.zeros_like(noisy)

    error = denoising_loss(denoise, objective, full(LATENT), given, settings)
    return inputs[0].item(), inputs[1].item(), error.item()


def test_diffusion_adds_noise_by_the_schedule() -> None:
    noisy = Diffusion(SCHEDULE, "epsilon").add_noise(full(LATENT), full(NOISE), torch.tensor([1]))
    assert noisy.item() == pytest.approx(0.8 * 2 + 0.6 * -1)


@pytest.mark.parametrize(
    ("prediction_type", "expected"),
    [("epsilon", -1.0), ("sample", 2.0), ("v_prediction", 0.8 * -1 - 0.6 * 2)],
)
def test_diffusion_asks_for_noise_latents_or_velocity(prediction_type: str, expected: float) -> None:
    objective = Diffusion(SCHEDULE, prediction_type)
    target = objective.target(full(LATENT), full(NOISE), torch.tensor([1]))
    assert target.item() == pytest.approx(expected)
    noisy = 0.8 * 2 - 0.6 * 1
    assert loss(objective, draws()) == pytest.approx([(noisy - expected) ** 2])


def test_flow_matching_goes_straight_from_latents_to_noise() -> None:
    objective, timesteps = FlowMatching(), torch.tensor([250.0])
    assert objective.add_noise(full(LATENT), full(NOISE), timesteps).item() == pytest.approx(0.75 * 2 - 0.25)
    assert objective.target(full(LATENT), full(NOISE), timesteps).item() == NOISE - LATENT
    uniform = LossSettings(timestep_sampling="uniform")
    assert loss(objective, draws(torch.tensor([0.25])), uniform) == pytest.approx([(1.25 + 3) ** 2])


def test_the_shift_moves_timesteps_to_more_noise() -> None:
    timesteps = FlowMatching(1000, shift=3.0).timesteps(torch.tensor([0.25, 0.5, 0.75]))
    assert timesteps.dtype == torch.float32
    assert timesteps.tolist() == pytest.approx([500.0, 750.0, 900.0])  # 3 u / (1 + 2 u) * 1000


def test_the_loss_is_one_a_picture_and_the_mean_over_its_elements() -> None:
    latents = torch.tensor([[[[1.0, 3.0]]], [[[0.0, 2.0]]]])
    noise = torch.zeros_like(latents)
    losses = denoising_loss(
        lambda noisy, _: torch.zeros_like(noisy, dtype=torch.bfloat16),
        Diffusion(SCHEDULE, "sample"),
        latents,
        Draws(torch.tensor([0.0, 0.9]), noise),
    )
    assert losses.dtype == torch.float32
    assert losses.tolist() == pytest.approx([(1 + 9) / 2, (0 + 4) / 2])


def test_uniform_timesteps_hit_every_step_equally_often() -> None:
    position = (torch.arange(16_000) + 0.5) / 16_000
    timesteps = Diffusion(torch.linspace(0.99, 0.01, 1000), "epsilon").timesteps(
        density(position, LossSettings(), "uniform")
    )
    assert timesteps.dtype == torch.int64
    assert timesteps.bincount().tolist() == [16] * 1000


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.5, 1.6)])
def test_logit_normal_positions_have_the_stated_median_and_quartiles(mean: float, std: float) -> None:
    settings = LossSettings(timestep_sampling="logit_normal", timestep_mean=mean, timestep_std=std)
    quartile = NormalDist().inv_cdf(0.75)
    expected = [1 / (1 + math.exp(-(mean + std * z))) for z in (-quartile, 0, quartile)]
    positions = density(torch.tensor([0.25, 0.5, 0.75]), settings, "uniform")
    assert positions.tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("settings", [LossSettings(), LossSettings("logit_normal", timestep_std=9.0)])
def test_positions_stay_strictly_between_clean_and_noise(settings: LossSettings) -> None:
    ends = density(torch.tensor([0.0, 1 - 2**-24]), settings, "uniform")
    assert 0 < ends[0] < 1e-7
    assert 1 - 1e-7 < ends[1] < 1
    last = Diffusion(torch.linspace(0.99, 0.01, 1000), "epsilon").timesteps(ends)
    assert last.tolist() == [0, 999]


def test_each_objective_samples_timesteps_its_own_way_unless_told() -> None:
    at = draws(torch.tensor([0.25]))
    quartile = 1000 / (1 + math.exp(NormalDist().inv_cdf(0.75)))
    told = [seen(FlowMatching(), at, LossSettings(sampling))[1] for sampling in (None, "uniform")]
    assert told == pytest.approx([quartile, 250.0])
    diffusion = Diffusion(torch.linspace(0.99, 0.01, 1000), "epsilon")
    told = [seen(diffusion, at, LossSettings(sampling))[1] for sampling in (None, "logit_normal")]
    assert told == [250, math.floor(quartile)]


@pytest.mark.parametrize(
    ("prediction_type", "expected"),
    # SNR 1 and 9 and 0: below gamma = 5, above it, and none
    [
        ("epsilon", [1.0, 5 / 9, 1.0]),
        ("sample", [1.0, 5.0, 0.0]),
        ("v_prediction", [1 / 2, 5 / 10, 0.0]),
    ],
)
def test_min_snr_weighs_the_loss(prediction_type: str, expected: list[float]) -> None:
    objective = Diffusion(torch.tensor([0.5, 0.9, 0.0]), prediction_type)
    at = draws(torch.tensor([0.1, 0.5, 0.9]))
    assert objective.snr(torch.arange(3)).tolist() == pytest.approx([1.0, 9.0, 0.0], rel=1e-5)
    plain, weighted = loss(objective, at), loss(objective, at, LossSettings(min_snr_gamma=5.0))
    assert weighted == pytest.approx([w * p for w, p in zip(expected, plain, strict=True)], rel=1e-5)


@pytest.mark.parametrize("objective", [Diffusion(SCHEDULE, "epsilon"), FlowMatching(4)])
def test_offset_noise_shifts_each_channel_of_the_noise(objective: Objective) -> None:
    noise = torch.zeros(2, 2, 8, 8)
    offset = torch.tensor([[1.0, -2.0], [0.0, 3.0]])
    given = Draws(torch.tensor([0.5, 0.5]), noise, offset=offset)
    inputs = []

    def denoise(noisy: Tensor, timesteps: Tensor) -> Tensor:
        inputs.append(noisy)
        return torch.zeros_like(noisy)

    settings = LossSettings(offset_noise=0.1)
    losses = denoising_loss(denoise, objective, torch.zeros_like(noise), given, settings)
    scale = 0.5 if isinstance(objective, FlowMatching) else math.sqrt(0.5)  # of the noise at half way
    assert torch.allclose(inputs[0].mean(dim=(2, 3)), scale * 0.1 * offset)
    assert losses.tolist() == pytest.approx([(0.1**2 + 0.2**2) / 2, 0.3**2 / 2])  # the target has it too


@pytest.mark.parametrize(
    ("objective", "noise_scale", "target"),
    [
        (Diffusion(SCHEDULE, "epsilon"), 0.6, -1.0),
        (Diffusion(SCHEDULE, "v_prediction"), 0.6, 0.8 * -1 - 0.6 * 2),
        (FlowMatching(), 0.3, -1.0 - 2.0),
    ],
)
def test_input_perturbation_changes_the_input_and_not_the_target(
    objective: Objective, noise_scale: float, target: float
) -> None:
    plain = LossSettings(timestep_sampling="uniform")
    given = draws(perturbation=full(7.0))
    before, _, error_before = seen(objective, given, plain)
    after, _, error_after = seen(objective, given, replace(plain, input_perturbation=0.1))
    assert after - before == pytest.approx(noise_scale * 0.1 * 7.0, rel=1e-5)
    assert error_before == error_after == pytest.approx(target**2)


def test_the_pseudo_huber_loss_has_its_value() -> None:
    # errors of 1 - (-1) = 2: 2 * 1.5^2 * (sqrt(1 + (2 / 1.5)^2) - 1) = 4.5 * (5 / 3 - 1) = 3
    objective = Diffusion(SCHEDULE, "epsilon")
    assert loss(objective, draws(), LossSettings(huber_delta=1.5)) == pytest.approx([3.0])


def test_the_pseudo_huber_loss_tends_to_the_squared_and_to_the_absolute_error() -> None:
    objective = Diffusion(SCHEDULE, "epsilon")
    assert loss(objective, draws(), LossSettings(huber_delta=1e4)) == pytest.approx([4.0])
    assert loss(objective, draws(), LossSettings(huber_delta=1e-4)) == pytest.approx([2 * 1e-4 * 2], rel=1e-3)


def test_the_pseudo_huber_loss_keeps_small_errors() -> None:
    error = denoising_loss(
        lambda noisy, _: full(NOISE + 1e-3),
        Diffusion(SCHEDULE, "epsilon"),
        full(LATENT),
        draws(),
        LossSettings(huber_delta=100.0),
    )
    assert error.item() == pytest.approx(1e-6, rel=1e-3)  # the root of 1 + 1e-10 is 1 in float32


def test_zero_terminal_snr_ends_in_pure_noise_and_keeps_the_first_step() -> None:
    config = DDPMScheduler(**STABLE_DIFFUSION, prediction_type="v_prediction").config
    plain = Diffusion.from_scheduler(config).alphas_cumprod
    rescaled = Diffusion.from_scheduler(config, zero_terminal_snr=True).alphas_cumprod
    assert plain[-1] > 0.004
    assert rescaled[-1] == 0
    assert rescaled[0].item() == pytest.approx(plain[0].item())
    assert (rescaled.diff() < 0).all()
    theirs = DDPMScheduler(**STABLE_DIFFUSION, rescale_betas_zero_snr=True).alphas_cumprod
    assert torch.allclose(rescaled, theirs, atol=1e-5)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_from_scheduler_is_the_diffusion_of_diffusers(prediction_type: str) -> None:
    config = EulerDiscreteScheduler(**STABLE_DIFFUSION, prediction_type=prediction_type).config
    objective, theirs = Diffusion.from_scheduler(config), DDPMScheduler(**STABLE_DIFFUSION)
    assert (objective.num_timesteps, objective.prediction_type) == (1000, prediction_type)
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 5, 4, 3, 6, generator=generator)
    timesteps = torch.tensor([0, 1, 500, 998, 999])
    assert torch.equal(
        objective.add_noise(latents, noise, timesteps), theirs.add_noise(latents, noise, timesteps)
    )
    expected = {
        "epsilon": noise,
        "sample": latents,
        "v_prediction": theirs.get_velocity(latents, noise, timesteps),
    }
    assert torch.equal(objective.target(latents, noise, timesteps), expected[prediction_type])


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_from_scheduler_is_the_flow_matching_of_diffusers(shift: float) -> None:
    theirs = FlowMatchEulerDiscreteScheduler(shift=shift)
    objective = FlowMatching.from_scheduler(theirs.config)
    position = torch.tensor([1.0, 0.8, 0.5, 0.001])
    timesteps = theirs.timesteps[[0, 200, 500, 999]]
    assert torch.allclose(objective.timesteps(position), timesteps)
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 4, 4, 3, 6, generator=generator)
    noisy = objective.add_noise(latents, noise, timesteps)
    assert torch.allclose(noisy, theirs.scale_noise(latents, timesteps, noise), atol=1e-6)


def test_dynamic_shifting_leaves_training_unshifted() -> None:
    config = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True).config
    assert FlowMatching.from_scheduler(config).timesteps(torch.tensor([0.5])).item() == 500.0


def test_the_schedule_moves_to_a_device_in_a_new_objective() -> None:
    objective = Diffusion(SCHEDULE, "sample")
    moved = objective.to("meta")
    assert (moved.alphas_cumprod.device.type, moved.prediction_type) == ("meta", "sample")
    assert objective.alphas_cumprod.device.type == "cpu"


def test_latents_are_drawn_from_the_posterior_and_scaled() -> None:
    def scale(**config: float | None) -> Any:
        autoencoder: Any = SimpleNamespace(config=config)
        return Codec().scale(autoencoder)

    shifted = scale(scaling_factor=2.0, shift_factor=1.0)
    latents = Codec().sample(full(3.0), full(2 * math.log(0.5)), shifted, full(NOISE))
    assert latents.item() == pytest.approx((3 - 0.5 - 1) * 2)
    unshifted = scale(scaling_factor=2.0, shift_factor=None)
    assert Codec().sample(full(3.0), full(0.0), unshifted, full(0)).item() == pytest.approx(6.0)


def test_an_unknown_prediction_type_is_refused() -> None:
    with pytest.raises(ValueError, match="model.base: prediction_type 'noise' .* choose another model"):
        Diffusion(SCHEDULE, "noise")


def test_a_schedule_of_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="model.base: its scheduler has no beta_schedule; choose"):
        Diffusion.from_scheduler(FlowMatchEulerDiscreteScheduler().config)
    with pytest.raises(ValueError, match="model.base: its scheduler has no shift; choose"):
        FlowMatching.from_scheduler(DDPMScheduler().config)


def test_zero_terminal_snr_is_refused_for_a_model_that_predicts_epsilon() -> None:
    with pytest.raises(
        ValueError, match="train.loss.zero_terminal_snr: .* v_prediction model or turn it off"
    ):
        Diffusion.from_scheduler(DDPMScheduler().config, zero_terminal_snr=True)


@pytest.mark.parametrize(
    ("objective", "settings", "message"),
    [
        (
            FlowMatching(),
            LossSettings(min_snr_gamma=5.0),
            "train.loss.min_snr_gamma: flow matching has no .*; leave it empty",
        ),
        (
            Diffusion(SCHEDULE, "epsilon"),
            LossSettings(timestep_sampling="cosine"),
            "train.loss.timestep_sampling: 'cosine' is not uniform or logit_normal",
        ),
        (
            Diffusion(SCHEDULE, "epsilon"),
            LossSettings(timestep_mean=0.5),
            "train.loss.timestep_mean, .* set train.loss.timestep_sampling: logit_normal",
        ),
        (
            FlowMatching(),
            LossSettings(timestep_sampling="uniform", timestep_std=0.5),
            "train.loss.timestep_std: uniform sampling has no such",
        ),
    ],
)
def test_settings_that_an_objective_cannot_follow_are_refused(
    objective: Objective, settings: LossSettings, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        objective.check(settings)
    with pytest.raises(ValueError, match=message):
        loss(objective, draws(), settings)


def test_ema_follows_with_its_decay() -> None:
    weight = torch.zeros(1)
    ema = EMA([("w", weight)], decay=0.5)
    ema.update([("w", weight + 1)], step=100)
    assert ema.averages["w"].item() == pytest.approx(0.5)
    ema.update([("w", weight + 1)], step=1)  # warm-up: (1 + 1) / (10 + 1)
    assert ema.averages["w"].item() == pytest.approx(1 - 0.5 * 2 / 11)


def test_a_mask_weighs_what_is_learned_and_the_loss_does_not_depend_on_its_size() -> None:
    latents, objective = torch.zeros(3, 2, 4, 4), FlowMatching()
    given = Draws(torch.full((3,), 0.5), torch.ones_like(latents))
    wrong = torch.zeros_like(latents)
    wrong[:, :, :2] = 3.0  # the target is 1 everywhere: errors of 4 above, 1 below
    mask = torch.zeros(3, 1, 4, 4)
    mask[0, :, :2], mask[1, :, 3:], mask[2] = 1, 1, 1

    def losses(settings: LossSettings, mask: torch.Tensor | None) -> list[float]:
        return denoising_loss(lambda *_: wrong, objective, latents, given, settings, mask).tolist()

    plain = LossSettings()
    assert losses(plain, None) == pytest.approx([2.5] * 3)
    assert losses(plain, mask) == pytest.approx([4, 1, 2.5])
    assert losses(LossSettings(outside_mask=1.0), mask) == pytest.approx([2.5] * 3)
    # Eight latents of 4 and eight of 1 at half the weight.
    assert losses(LossSettings(outside_mask=0.5), mask)[0] == pytest.approx((8 * 4 + 4 * 1) / 12)
    assert losses(plain, torch.zeros_like(mask)) == [0, 0, 0]
