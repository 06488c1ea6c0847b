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
from safetensors import safe_open
from safetensors.numpy import load_file

from ray_jobs.config import Config
from ray_jobs.diffusion.sampling import sample_pictures
from ray_jobs.publishing.model_card import usage
from ray_jobs.publishing.pages import guidance_arguments, published_base
from ray_jobs.training.setup import build_model, exporter
from ray_jobs.weights.loading import LORA_WEIGHTS, load_pipeline
from serving.engine.engine import Engine
from serving.request import Request
from tests.cards import levels, without_torchvision
from tests.journeys.test_journeys import JOURNEYS
from tests.journeys.walk import SIDE, Journey, configuration
from tests.unit.test_assistant import assistant_of

PROMPT = "a small red circle"


def write_weights(config: Config, folder: Path) -> None:
    """What the training exports, the trained weights moved at random."""
    pipeline, model = build_model(config)
    export = exporter(config, pipeline, model, 0)
    torch.manual_seed(1)
    spread = 0.1 if config.train.method == "lora" else 0.02
    moved = {name: each.detach() + spread * torch.randn_like(each) for name, each in model.trained()}
    folder.mkdir()
    export(moved, folder)


def plain_picture(config: Config, folder: Path) -> Any:
    """What the card's program draws, unchanged."""
    base = Path(config.model.base)
    if config.train.method == "lora":
        (folder / base.name).symlink_to(base)
    with contextlib.chdir(folder), without_torchvision():
        exec(usage(config, published_base(config), PROMPT, guidance_arguments(config)), {})
    return levels(folder / "picture.png")


def stored(file: Path) -> tuple[dict[str, str], dict[str, bytes]]:
    """Metadata and tensors of a safetensors file."""
    with safe_open(file, framework="np") as opened:
        metadata = opened.metadata()
    return metadata, {name: tensor.tobytes() for name, tensor in load_file(file).items()}


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


# FLUX.1 Fill draws with a mask only, Qwen-Image-Edit with a picture, and a ControlNet follows one: see the
# journeys, and tests/serving/test_served_masks.py, test_served_edits.py and test_served_control.py.
DRAWN_FROM_TEXT = [
    journey
    for journey in JOURNEYS
    if journey.name not in ("fill", "edits-stream") and not journey.name.startswith("control")
]


def without_references(config: Config) -> Config:
    """The configuration for pictures that are drawn from their captions alone."""
    source = config.data.sources[0].model_copy(update={"reference_columns": [], "mask_column": None})
    data = config.data.model_copy(update={"sources": [source], "reference_resolution": None})
    return config.model_copy(update={"data": data})


@pytest.mark.parametrize("journey", DRAWN_FROM_TEXT, ids=[journey.name for journey in DRAWN_FROM_TEXT])
def test_trained_weights_are_one_model_in_every_program(journey: Journey, tmp_path: Path) -> None:
    config = without_references(configuration(journey, tmp_path, tmp_path))
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


def test_an_assistant_of_the_training_is_in_no_program(tmp_path: Path) -> None:
    [journey] = [each for each in JOURNEYS if each.name == "z-image"]
    config = configuration(journey, tmp_path, tmp_path)
    assistant = assistant_of(Path(config.model.base), tmp_path / "assistant")
    model = config.model.model_copy(update={"assistant": str(assistant)})
    assisted = config.model_copy(update={"model": model})
    folder, other = tmp_path / "model", tmp_path / "other"
    write_weights(config, folder)
    write_weights(assisted, other)
    # The same random weights: all that evaluators and endpoints load beside the base.
    assert {path.name for path in folder.iterdir()} == {path.name for path in other.iterdir()}
    # Not byte by byte: safetensors writes the entries of the metadata in any order.
    assert stored(folder / LORA_WEIGHTS) == stored(other / LORA_WEIGHTS)
    assert np.array_equal(plain_picture(config, folder), plain_picture(assisted, other))
