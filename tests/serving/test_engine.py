"""The engine draws what plain diffusers draws, whatever else is in the batch."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ray_jobs.diffusion.loading import load_pipeline
from serving.engine import Engine

PROMPTS = ["a red apple", "a sad face", "a rocket", ""]
SEEDS = [0, 7, 7, 2**31 - 1]
STEPS = [4, 3, 4, 3]
GUIDANCE_SCALES = [3.0, 1.0, 7.5, 3.0]


def drawn_by_diffusers(pipeline: Any, row: int) -> np.ndarray:
    generator = torch.Generator().manual_seed(SEEDS[row])
    answer = pipeline(
        PROMPTS[row],
        generator=generator,
        num_inference_steps=STEPS[row],
        guidance_scale=GUIDANCE_SCALES[row],
    )
    return np.asarray(answer.images[0]).astype(int)


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "DPMSolverMultistepScheduler", "PNDMScheduler"])
def test_every_row_of_a_mixed_batch_is_the_picture_of_plain_diffusers(
    tiny_model: Path, scheduler: str
) -> None:
    import diffusers

    pipeline = load_pipeline(str(tiny_model))
    # As Stable Diffusion's own PNDM is configured; without it the scheduler needs four steps.
    options = {"skip_prk_steps": True} if scheduler == "PNDMScheduler" else {}
    pipeline.scheduler = getattr(diffusers, scheduler).from_config(pipeline.scheduler.config, **options)
    pictures = Engine(pipeline).generate(PROMPTS, SEEDS, STEPS, GUIDANCE_SCALES)
    for row, picture in enumerate(pictures):
        difference = np.abs(picture.numpy().astype(int) - drawn_by_diffusers(pipeline, row))
        assert difference.max() <= 2, f"row {row}"


def test_the_resolution_is_the_models_own(tiny_model: Path) -> None:
    engine = Engine(load_pipeline(str(tiny_model)))
    (picture,) = engine.generate(["a red apple"], [0], [1], [3.0])
    assert picture.shape == (engine.resolution, engine.resolution, 3)


def test_prompt_embeddings_are_kept_and_the_oldest_are_dropped(tiny_model: Path) -> None:
    engine = Engine(load_pipeline(str(tiny_model)), cached_prompts=2)
    first = engine.embed(["a", "b"])["prompt_embeds"]
    encoded = []
    engine.pipeline.text_encoder.register_forward_hook(lambda *_: encoded.append(1))
    assert torch.equal(engine.embed(["a", "b"])["prompt_embeds"], first) and not encoded
    engine.embed(["c"])
    engine.embed(["b"])
    assert len(encoded) == 1
    engine.embed(["a"])
    assert len(encoded) == 2


@pytest.mark.parametrize("scheduler", ["DDPMScheduler", "EulerAncestralDiscreteScheduler"])
def test_a_scheduler_that_draws_noise_is_refused(tiny_model: Path, scheduler: str) -> None:
    import diffusers

    pipeline = load_pipeline(str(tiny_model))
    pipeline.scheduler = getattr(diffusers, scheduler).from_config(pipeline.scheduler.config)
    with pytest.raises(ValueError, match=f"{scheduler} draws noise"):
        Engine(pipeline)


def test_a_step_count_below_the_schedulers_least_is_refused(tiny_model: Path) -> None:
    from diffusers import PNDMScheduler

    pipeline = load_pipeline(str(tiny_model))
    pipeline.scheduler = PNDMScheduler.from_config(pipeline.scheduler.config, skip_prk_steps=False)
    engine = Engine(pipeline)
    engine.check_steps(4)
    with pytest.raises(ValueError, match="cannot draw in 3 steps"):
        engine.check_steps(3)
