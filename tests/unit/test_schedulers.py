"""A model that was trained to pure noise is drawn from it: in scores, by its card and by the endpoint."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from ray_jobs.diffusion.families import family_of
from ray_jobs.diffusion.objectives import Diffusion
from ray_jobs.diffusion.sampling import sample_pictures
from ray_jobs.diffusion.schedulers import trained_scheduler
from ray_jobs.weights.loading import load_pipeline
from ray_jobs.weights.schedulers import SCHEDULER, load_scheduler, scheduler_class
from serving.engine.engine import Engine
from serving.request import Request
from tests.serving import plain_diffusers
from tests.serving.conftest import save_adapters

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
CLASSES = ["DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "PNDMScheduler"]


def velocity(name: str) -> Any:
    """A scheduler of a model that predicts the velocity."""
    options = {"skip_prk_steps": True} if name == "PNDMScheduler" else {}
    return getattr(diffusers, name)(**BETAS, prediction_type="v_prediction", **options)


@pytest.mark.parametrize("name", CLASSES)
def test_its_noise_levels_are_those_of_the_training_and_it_begins_with_pure_noise(name: str) -> None:
    own = velocity(name)
    found = trained_scheduler(own)
    assert type(found).__name__ == ("DDIMScheduler" if name == "PNDMScheduler" else name)
    objective = Diffusion.from_scheduler(own.config, zero_terminal_snr=True)
    # Euler and DPM-Solver++ take 2^-24 for the last, where they would divide by 0.
    assert torch.allclose(found.alphas_cumprod, objective.alphas_cumprod, atol=1e-6)
    assert own.alphas_cumprod[-1] > 0.004
    found.set_timesteps(10)
    assert found.timesteps[0] == 999
    again = trained_scheduler(found)
    assert type(again) is type(found) and torch.equal(again.alphas_cumprod, found.alphas_cumprod)


@pytest.fixture(scope="module")
def base(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that predicts the velocity."""
    folder, pipeline = tmp_path_factory.mktemp("velocity"), load_pipeline(str(tiny_model))
    pipeline.scheduler = velocity("EulerDiscreteScheduler")
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LoRA weights with the scheduler that they were trained for."""
    folder = save_adapters(base, tmp_path_factory.mktemp("adapter") / "model", seed=0)
    trained_scheduler(load_pipeline(str(base)).scheduler).save_pretrained(folder / SCHEDULER)
    return folder


def plain(base: Path, adapter: Path) -> Any:
    """As a user of diffusers loads it, by the model's card."""
    pipeline = plain_diffusers.load(base)
    pipeline.load_lora_weights(adapter, weight_name="pytorch_lora_weights.safetensors")
    kind = getattr(diffusers, scheduler_class(adapter))
    pipeline.scheduler = kind.from_pretrained(adapter, subfolder=SCHEDULER)
    return pipeline


def test_scores_and_the_endpoint_draw_an_adapter_with_the_scheduler_that_lies_beside_it(
    base: Path, adapter: Path
) -> None:
    request = Request("a small red circle", 5, 4, 3.0, None, 64, 64, adapter="a", zero_terminal_snr=True)
    expected = plain_diffusers.draw(plain(base, adapter), request)
    pipeline = load_pipeline(str(base), adapter)
    [[sampled]] = sample_pictures(
        pipeline, [request.prompt], [5], shapes=[(64, 64)], num_steps=4, guidance_scale=3.0, batch_size=1
    )
    assert (sampled.permute(1, 2, 0) - expected).abs().max() <= 0.55
    engine = Engine(load_pipeline(str(base)), adapter_folder=lambda name: adapter)
    # In one batch with a row of the base, which was trained otherwise.
    other = Request("a small red circle", 5, 4, 3.0, None, 64, 64)
    served, alone = (engine.submit(each) for each in (request, other))
    engine.drain()
    assert (served.result(0).pixels - expected).abs().max() <= 0.55
    usual = plain_diffusers.draw(plain_diffusers.load(base), other)
    assert (alone.result(0).pixels - usual).abs().max() <= 0.55


def test_a_row_beside_those_of_pndm_is_drawn_by_ddim(tiny_model: Path) -> None:
    pipeline, theirs = load_pipeline(str(tiny_model)), plain_diffusers.load(tiny_model)
    pipeline.scheduler = velocity("PNDMScheduler")
    engine = Engine(pipeline)
    usual = Request("a small red circle", 5, 4, 3.0, None, 64, 64)
    rows = [usual, replace(usual, zero_terminal_snr=True)]
    futures = [engine.submit(row) for row in rows]
    engine.drain()
    for row, future in zip(rows, futures, strict=True):
        own = velocity("PNDMScheduler")
        theirs.scheduler = trained_scheduler(own) if row.zero_terminal_snr else own
        assert (future.result(0).pixels - plain_diffusers.draw(theirs, row)).abs().max() <= 0.55


def test_a_scheduler_file_of_another_class_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / SCHEDULER
    folder.mkdir()
    (folder / "scheduler_config.json").write_text(json.dumps({"_class_name": "DiffusionPipeline"}))
    with pytest.raises(ValueError, match="DiffusionPipeline is not a scheduler of diffusers"):
        load_scheduler(tmp_path)


def test_a_whole_pipeline_is_saved_with_the_scheduler_that_it_was_trained_for(
    tiny_model: Path, tmp_path: Path
) -> None:
    from ray_jobs.weights.saving import save_pipeline

    pipeline = load_pipeline(str(tiny_model))
    family = family_of(pipeline)
    save_pipeline(
        tiny_model,
        {family.denoiser: ("denoiser", pipeline.unet)},
        {},
        tmp_path,
        trained_scheduler(velocity("PNDMScheduler")),
    )
    read = load_pipeline(str(tmp_path)).scheduler
    assert (type(read).__name__, read.config.rescale_betas_zero_snr) == ("DDIMScheduler", True)
    assert type(plain_diffusers.load(tmp_path).scheduler).__name__ == "DDIMScheduler"
