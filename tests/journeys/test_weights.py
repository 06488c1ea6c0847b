"""What each journey's training writes is one model in three programs: the model card's, which is plain
diffusers, the endpoint's engine, and the loading of scores. Without Ray: trained weights are drawn at random.
"""

import contextlib
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ray_jobs.config import Config
from ray_jobs.diffusion.sampling import sample_pictures
from ray_jobs.publishing.model_card import usage
from ray_jobs.publishing.pages import guidance_arguments
from ray_jobs.training.setup import build_model, exporter
from ray_jobs.weights.loading import load_pipeline
from ray_jobs.weights.model_files import variant_name, without_lora_loader
from serving.engine.engine import Engine
from serving.request import Request
from tests.journeys.test_journeys import JOURNEYS
from tests.journeys.walk import SIDE, Journey, configuration

PROMPT = "a small red circle"


def write_weights(config: Config, folder: Path) -> None:
    """What the training exports, the trained weights moved at random."""
    pipeline, model = build_model(config)
    export = exporter(config, pipeline, model, 0)
    torch.manual_seed(1)
    spread = 0.05 if config.train.method == "lora" else 0.02
    moved = {name: each.detach() + spread * torch.randn_like(each) for name, each in model.trained()}
    folder.mkdir()
    export(moved, folder)


def plain_picture(config: Config, folder: Path) -> Any:
    """What the card's program draws, unchanged."""
    base = Path(config.model.base)
    lora = config.train.method == "lora"
    if lora:
        (folder / base.name).symlink_to(base)
    with contextlib.chdir(folder):
        variant = variant_name(str(base)) if lora else None
        injected = without_lora_loader(str(base)) if lora else None
        exec(usage(config, PROMPT, guidance_arguments(config), variant=variant, injected=injected), {})
    return np.asarray(Image.open(folder / "picture.png")).astype(int)


def engine_picture(engine: Engine, request: Request) -> Any:
    future = engine.submit(request)
    while engine.unfinished:
        if not engine.step():
            time.sleep(0.01)
    return future.result(0).pixels.numpy().astype(int)


def scored_picture(config: Config, folder: Path) -> Any:
    """What sampling for scores draws."""
    steps, scale = config.evaluate.inference_steps, config.evaluate.guidance_scale
    pipeline = load_pipeline(config.model.base, folder)
    [batch] = sample_pictures(
        pipeline, [PROMPT], [0], shapes=[(SIDE, SIDE)], num_steps=steps, guidance_scale=scale, batch_size=1
    )
    return batch[0].permute(1, 2, 0).numpy().astype(int)


@pytest.mark.parametrize("journey", JOURNEYS, ids=[journey.name for journey in JOURNEYS])
def test_trained_weights_are_one_model_in_every_program(journey: Journey, tmp_path: Path) -> None:
    config = configuration(journey, tmp_path, tmp_path)
    folder = tmp_path / "model"
    write_weights(config, folder)
    plain = plain_picture(config, folder)
    steps, scale = config.evaluate.inference_steps, config.evaluate.guidance_scale
    request = Request(PROMPT, seed=0, steps=steps, guidance_scale=scale, height=SIDE, width=SIDE)
    if config.train.method == "lora":
        served = Engine(load_pipeline(config.model.base), adapter_folder=lambda name: folder)
        adapted = engine_picture(served, replace(request, adapter="trained"))
        assert np.abs(adapted - plain).max() <= 2
        assert np.abs(engine_picture(served, request) - plain).max() > 5, "the adapter changes nothing"
    else:
        whole = engine_picture(Engine(load_pipeline(config.model.base, folder)), request)
        assert np.abs(whole - plain).max() <= 2
    assert np.abs(scored_picture(config, folder) - plain).max() <= 2
