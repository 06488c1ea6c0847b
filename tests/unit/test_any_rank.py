"""A family of another kind is expressible: latents of five dimensions in a shape of their own, a mask as a
condition, two denoising components and no text encoder that is trained."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from ray_jobs.diffusion.families import Components, Conditions, Family
from ray_jobs.diffusion.families.codec import Codec
from ray_jobs.diffusion.families.noise_schedule import RectifiedFlow
from ray_jobs.diffusion.families.text import Captions, Encoders, Text
from ray_jobs.diffusion.finetuning import FineTuning, add_lora
from ray_jobs.diffusion.objectives import LossSettings
from ray_jobs.diffusion.randomness import draw
from ray_jobs.diffusion.sampling import initial_noise, sample_latents, seeded
from ray_jobs.diffusion.solvers import advance, coefficients, tabulate

FRAMES, SIDE = 2, 4
RAW, PACKED = (3, FRAMES, SIDE, SIDE), (12, FRAMES, SIDE // 2, SIDE // 2)


class Letters(Text):
    """The code of each letter, and a mask of those that a caption has."""

    tokens = ("input_ids",)
    embeds = ("prompt_embeds", "prompt_mask")
    encoders = ("letters",)

    def embed(self, encoders: Encoders, tokens: Captions) -> Captions:
        ids = tokens["input_ids"]
        return {"prompt_embeds": encoders["letters"](ids), "prompt_mask": ids > 0}

    def shapes(self, denoiser: Mapping[str, Any]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return {"prompt_embeds": ((5, 8), torch.float32), "prompt_mask": ((5,), torch.bool)}


class Frames(Codec):
    """Latents whose channels hold squares of 2 x 2, normalised in that form."""

    def scale(self, autoencoder: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.arange(12.0), torch.full((12,), 0.5)

    def pack(self, latents: torch.Tensor) -> torch.Tensor:
        channels, frames, height, width = latents.shape[1:]
        squares = latents.reshape(-1, channels, frames, height // 2, 2, width // 2, 2)
        return squares.permute(0, 1, 4, 6, 2, 3, 5).reshape(-1, 4 * channels, frames, height // 2, width // 2)

    def unpack(self, latents: torch.Tensor) -> torch.Tensor:
        channels, frames, height, width = latents.shape[1:]
        squares = latents.reshape(-1, channels // 4, 2, 2, frames, height, width)
        return squares.permute(0, 1, 4, 5, 2, 6, 3).reshape(-1, channels // 4, frames, 2 * height, 2 * width)


class Denoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.text, self.dtype = nn.Linear(12, 12), nn.Linear(8, 12), torch.float32

    def forward(self, latents: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        return self.to_q(latents.movedim(1, -1)).movedim(-1, 1) + self.text(text)[:, :, None, None, None]


class Video(Family):
    """Two networks: one for the noisy half of the schedule, one for the other."""

    pipeline_class = "VideoPipeline"
    trainable = {"early": ("to_q",), "late": ("to_q",)}
    text, codec, schedule = Letters(), Frames(), RectifiedFlow(max_shift=1.0)

    def denoise(
        self, model: Components, latents: torch.Tensor, timesteps: torch.Tensor, conditions: Conditions
    ) -> torch.Tensor:
        mask = conditions["prompt_mask"]
        assert mask.dtype == torch.bool
        text = (conditions["prompt_embeds"] * mask[..., None]).sum(dim=1)
        early, late = (model[name](latents, text) for name in ("early", "late"))
        return torch.where((timesteps >= 500).reshape(-1, 1, 1, 1, 1), early, late)

    def tiny(self, captions: Sequence[str], variant: str = "") -> Any:
        from diffusers import FlowMatchEulerDiscreteScheduler

        torch.manual_seed(0)
        return SimpleNamespace(
            config={},
            early=Denoiser(),
            late=Denoiser(),
            letters=nn.Embedding(30, 8),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=2.0),
        )


FAMILY = Video()


@pytest.fixture
def pipeline() -> Any:
    return FAMILY.tiny([])


def conditions_of(pipeline: Any) -> Conditions:
    tokens = {"input_ids": torch.tensor([[1, 2, 0, 0, 0], [3, 0, 0, 0, 0]])}
    with torch.no_grad():
        return FAMILY.text.embed(FAMILY.text.present(pipeline), tokens)


def test_latents_are_packed_normalised_and_brought_back() -> None:
    mean, logvar = torch.randn(2, *RAW), torch.full((2, *RAW), -30.0)
    scale = FAMILY.codec.scale(None)
    latents = FAMILY.codec.sample(mean, logvar, scale, torch.randn(2, *RAW))
    assert FAMILY.codec.packed_shape(RAW) == latents.shape[1:] == PACKED
    assert FAMILY.codec.unpacked_shape(PACKED) == RAW
    first = (mean[0, 0, 1, 0, 1] - 1) * 0.5  # channel 1: the upper right of a square
    assert latents[0, 1, 1, 0, 0] == pytest.approx(first.item(), abs=1e-5)
    shift, factor = (each.reshape(1, -1, 1, 1, 1) for each in scale)
    assert torch.allclose(FAMILY.codec.unpack(latents / factor + shift), mean, atol=1e-5)


def test_both_components_are_trained_on_latents_of_five_dimensions(pipeline: Any) -> None:
    settings = LossSettings(offset_noise=0.1, input_perturbation=0.1)
    for part in FAMILY.model(pipeline).values():
        part.requires_grad_(True)
    objective = FAMILY.schedule.objective(pipeline.scheduler.config)
    model = FineTuning(pipeline, FAMILY, objective, settings)
    assert [prefix for prefix, _ in model.components.values()] == ["denoiser", "further_denoisers.late"]
    drawn = draw((0,), 1, range(2), PACKED, settings, posterior_shape=RAW)
    assert drawn.posterior.shape == (2, *RAW) and drawn.loss.noise.shape == (2, *PACKED)
    draws = replace(drawn.loss, position=torch.tensor([0.1, 0.9]))
    latents = FAMILY.codec.sample(
        torch.randn(2, *RAW), torch.zeros(2, *RAW), FAMILY.codec.scale(None), drawn.posterior
    )
    optimizer, losses = torch.optim.Adam([p for _, p in model.trained()], lr=0.05), []
    for _ in range(20):
        loss = model(latents, conditions_of(pipeline), draws, torch.tensor([True, False]))
        assert loss.shape == (2,)
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
        losses.append(loss.mean().item())
    assert losses[-1] < losses[0]
    names = [name for name, p in model.trained() if p.grad is not None and p.grad.any()]
    assert {name.partition(".to_q")[0] for name in names if "to_q" in name} == {
        "denoiser",
        "further_denoisers.late",
    }


def test_each_component_has_its_own_default_layers_for_lora(pipeline: Any) -> None:
    from diffusers.loaders import PeftAdapterMixin

    for name, layers in FAMILY.trainable.items():
        part = getattr(pipeline, name)
        part.__class__ = type("Adaptable", (Denoiser, PeftAdapterMixin), {})
        add_lora(part, rank=2, alpha=2, dropout=0.0, target_modules=list(layers))
        adapted = {key for key, p in part.named_parameters() if p.requires_grad}
        assert {key.partition(".lora")[0] for key in adapted} == {"to_q"}


def test_solver_tables_step_as_the_scheduler_does(pipeline: Any) -> None:
    noise, conditions = initial_noise(seeded([1, 2]), PACKED), conditions_of(pipeline)
    null = {name: each[:1] for name, each in conditions.items()}
    scale = torch.tensor([3.0, 1.0])
    expected = sample_latents(
        FAMILY,
        FAMILY.model(pipeline),
        pipeline.scheduler,
        noise,
        conditions,
        null,
        num_steps=4,
        guidance_scale=scale,
    )
    schedule, latents = tabulate(pipeline.scheduler, FAMILY, 4, PACKED), noise
    clean = torch.zeros_like(noise)
    with torch.no_grad():
        for done in range(4):
            step = coefficients([(schedule, done)] * 2, "cpu", latents.dim() - 1)
            inputs = latents * step.input_scale
            both = [
                FAMILY.denoise(FAMILY.model(pipeline), inputs, step.timestep.flatten(), each)
                for each in ({name: t.expand(2, *t.shape[1:]) for name, t in null.items()}, conditions)
            ]
            output = FAMILY.guide(both[0], both[1], scale.reshape(-1, 1, 1, 1, 1))
            latents, clean, _ = advance(step, latents, output, clean)
    assert torch.allclose(latents, expected, atol=1e-5)
