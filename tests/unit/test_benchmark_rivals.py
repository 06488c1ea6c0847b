"""The benchmarks of training: they can be loaded, and their rivals do the same work as ours."""

import importlib
import json
from pathlib import Path

import pytest
import torch

from benchmarks.train.__main__ import PARTS
from benchmarks.train.limit import bare_loop
from benchmarks.train.measuring import changed, inputs_of, summary
from benchmarks.train.recipe import usual_recipe
from benchmarks.train.zero import by_kind
from ray_jobs.config import Config, load_config
from ray_jobs.diffusion.sampling import encode_prompts
from ray_jobs.training.setup import build_model
from ray_jobs.weights.loading import load_pipeline

DEMO = Path(__file__).parents[2] / "configs" / "demo.yaml"


def tiny(model: Path, pictures: Path, **train: object) -> Config:
    config = load_config(DEMO, [f"model.base={model}", f"data.source={pictures}", "train.batch_size=4"])
    return changed(config, **train)


@pytest.mark.parametrize("part", PARTS)
def test_every_part_can_be_run(part: str) -> None:
    assert callable(importlib.import_module(f"benchmarks.train.{part}").run)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_bare_loop_computes_the_loss_that_ours_does(
    method: str, tiny_model: Path, picture_folder: Path
) -> None:
    config = tiny(tiny_model, picture_folder, method=method)
    generator = torch.Generator().manual_seed(0)
    shapes = {"latents_mean": (4, 8, 8), "latents_logvar": (4, 8, 8), "prompt_embeds": (16, 32)}
    rows = {name: torch.randn((4, *shape), generator=generator) for name, shape in shapes.items()}
    inputs = inputs_of(config, rows, rank=0, world_size=1)
    _, model = build_model(config)
    ours = model(inputs["latents"], inputs["conditions"], inputs["draws"]).mean()
    rival = bare_loop(config, inputs)
    assert rival.forward().item() == pytest.approx(ours.item(), rel=1e-5)
    assert sum(p.numel() for p in rival.trained) == sum(p.numel() for _, p in model.all_trained)


def test_the_usual_recipe_trains_on_the_pictures_and_captions_of_the_folder(
    tiny_model: Path, picture_folder: Path
) -> None:
    config = tiny(tiny_model, picture_folder)
    recipe = usual_recipe(config, {})
    lines = (picture_folder / "metadata.jsonl").read_text().splitlines()
    first = recipe.loader.dataset[0]
    encoded = recipe.encode({name: value[None] for name, value in first.items()})
    expected = encode_prompts(load_pipeline(str(tiny_model)), [json.loads(lines[0])["text"]])
    assert first["pixels"].shape == (3, 64, 64)
    assert encoded["latents"].shape == (1, 4, 8, 8)
    torch.testing.assert_close(encoded["embeds"], expected["prompt_embeds"])


def test_memory_that_several_tensors_share_counts_once() -> None:
    layer = torch.nn.Linear(8, 4, bias=False)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 8)).sum().backward()
    optimizer.step()
    [weight] = layer.parameters()
    assert weight.grad is not None
    found = by_kind([weight, weight.detach()[1:]], [weight.grad], optimizer)
    assert found == {"parameters": 128, "gradients": 128, "optimizer": 2 * 128 + 4}  # and Adam's step


def test_a_turn_of_ours_is_compared_with_the_rivals_turns_around_it() -> None:
    """The first turns warm up and do not count."""
    ours = [{"whole": seconds, "wait": 0.25 * seconds} for seconds in (100.0, 2.0, 4.0)]
    rival = [{"whole": seconds} for seconds in (200.0, 1.0, 2.0, 4.0)]
    found = summary({"ours": ours, "rival": rival}, batch_size=6, steps=10)
    assert found["ratios"] == [0.75, 0.75]
    assert found["images_per_second"] == {"ours": 20.0, "rival": 30.0}
    assert found["ms_a_step"]["ours"] == {"wait": 75.0, "other": 225.0}
