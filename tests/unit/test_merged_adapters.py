"""Adapters merged into the base while pictures are drawn."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ray_jobs.diffusion.families import family_of
from ray_jobs.diffusion.protocols import Pipeline
from ray_jobs.diffusion.sampling import sample_pictures
from ray_jobs.evaluation.merged_adapters import MergedAdapters
from ray_jobs.weights.loading import load_lora, load_pipeline, unload_lora
from tests.unit.test_comfyui import adapter

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "LoRA of linear and convolution layers": (
        "StableDiffusionPipeline",
        {"target_modules": ["to_q", "to_v", "conv1", "proj_in"]},
    ),
    "DoRA": ("StableDiffusionPipeline", {"use_dora": True}),
    "without a loader of diffusers": ("PixArtSigmaPipeline", {}),
    "transformer": ("FluxPipeline", {}),
}


def drawn(pipeline: Pipeline) -> torch.Tensor:
    batches = sample_pictures(
        pipeline,
        ["a circle"] * 2,
        [0, 1],
        shapes=[(64, 64)] * 2,
        num_steps=3,
        guidance_scale=2.0,
        batch_size=2,
    )
    return torch.cat(list(batches))


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_adapter_draws_the_same_and_leaves_no_trace(
    tiny: Callable[[str], Path], tmp_path: Path, kind: str
) -> None:
    pipeline_class, settings = KINDS[kind]
    base = tiny(pipeline_class)
    adapter(base, tmp_path / "lora", **settings)
    pipeline = load_pipeline(str(base))
    denoiser = getattr(pipeline, family_of(pipeline).denoiser)
    before = {name: tensor.clone() for name, tensor in denoiser.state_dict().items()}
    bare = drawn(pipeline)
    load_lora(pipeline, tmp_path / "lora")
    apart = drawn(pipeline)
    merged = MergedAdapters(pipeline)
    together = drawn(pipeline)
    assert (apart.int() - together.int()).abs().max() <= 1
    assert (apart.int() - bare.int()).abs().max() > 5
    unload_lora(pipeline)
    merged.undo()
    after = denoiser.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert torch.equal(drawn(pipeline), bare)
