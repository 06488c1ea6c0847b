"""The benchmark of families runs, its rivals do the same work as ours, and their pictures are equal."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks import families
from benchmarks.families import (
    CONTROL,
    EDITS,
    GATES,
    PROMPTS,
    SERVED_EDITS,
    PlainControlLoop,
    PlainLoop,
    config_of,
    denoiser_call,
    lines_of,
    measure,
    tell,
)
from ray_jobs.diffusion.families import FAMILIES
from ray_jobs.training.setup import build_model
from tests.serving import plain_diffusers

NAME = "PixArtSigmaPipeline"


@pytest.mark.slow
def test_a_family_is_measured_and_its_pictures_are_the_pipelines() -> None:
    found = json.loads(json.dumps(measure(NAME, "small")))
    others = {CONTROL, EDITS, SERVED_EDITS}
    assert all(found[part]["ratio"] > 0 for part in GATES.keys() - others)
    assert not found.keys() & others, "it takes no references, and has no ControlNets"
    edits = measure("FluxKontextPipeline", "small", [SERVED_EDITS])[SERVED_EDITS]
    assert edits["ratio"] > 0 and edits["largest_difference"] <= 0.55
    assert found["served"]["largest_difference"] <= 0.55  # of 255 levels
    assert found["lines"] == lines_of(FAMILIES[NAME]) > 50
    found["lora"]["ratio"], found["served"]["ratio"] = 0.5, 2.0
    assert "lora 0.50 (below 0.95), " in tell(NAME, found) and "served 2.00; " in tell(NAME, found)


@pytest.mark.parametrize("method", ["lora", "full", CONTROL])
def test_the_plain_loop_trains_as_many_weights_as_ours(tiny_flux: Path, method: str) -> None:
    config = config_of(tiny_flux, method)
    _, model = build_model(config)
    kind = PlainControlLoop if method == CONTROL else PlainLoop
    loop = kind(plain_diffusers.load(tiny_flux), FAMILIES["FluxPipeline"], config.train)
    assert sum(p.numel() for p in loop.trained) == sum(p.numel() for _, p in model.all_trained)
    before = [parameter.clone() for parameter in loop.trained]
    for _ in range(2):  # the first step only moves the half of a LoRA that is 0
        loop.step()
    assert not any(torch.equal(old, new) for old, new in zip(before, loop.trained, strict=True))


def test_the_plain_loop_computes_as_many_tokens_as_ours_with_a_reference(tiny: Callable[[str], Path]) -> None:
    folder, family = tiny("FluxKontextPipeline"), FAMILIES["FluxKontextPipeline"]
    plain, edits = (
        denoiser_call(plain_diffusers.load(folder), family, with_reference=each)[1]["hidden_states"]
        for each in (False, True)
    )
    assert edits.shape[1] == 2 * plain.shape[1] and len(edits) == len(PROMPTS)
    with families.our_loop(config_of(folder, EDITS)) as ours:
        assert ours.rows["reference_0"].shape == ours.rows["latents_mean"].shape
        ours.step()


def test_the_plain_loop_gets_all_captions_from_the_pipeline_in_one_call(tiny_flux: Path) -> None:
    arguments, options = denoiser_call(plain_diffusers.load(tiny_flux), FAMILIES["FluxPipeline"])
    assert not arguments
    assert len(options["hidden_states"]) == len(options["encoder_hidden_states"]) == len(PROMPTS)
    assert not options["encoder_hidden_states"][0].equal(options["encoder_hidden_states"][1])
    assert {request.steps for request in families.REQUESTS} == {4, 6, 8, 10}
