"""What the autoencoder leaves of a picture is the floor that a model can reach."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ray_jobs.diffusion.families import FAMILIES
from ray_jobs.diffusion.sampling import reconstructed
from ray_jobs.weights.loading import load_pipeline
from tests.serving import plain_diffusers


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "FluxPipeline", "Flux2KleinPipeline"])
def test_pictures_are_restored_as_by_the_autoencoder_alone(tiny: Callable[[str], Path], name: str) -> None:
    assert name in FAMILIES
    folder = tiny(name)
    pictures = torch.randint(0, 256, (2, 3, 64, 64), generator=torch.Generator().manual_seed(0)).byte()
    found = reconstructed(load_pipeline(str(folder)), pictures)
    vae = plain_diffusers.load(folder).vae
    with torch.no_grad():
        decoded = vae.decode(vae.encode(pictures / 127.5 - 1).latent_dist.mean).sample
    expected = ((decoded / 2 + 0.5).clamp(0, 1) * 255).round()
    assert found.shape == pictures.shape and (found - expected).abs().max() <= 1
