"""A small model of each family, built once."""

import hashlib
from pathlib import Path

import pytest

from tests import tiny_models


@pytest.fixture(scope="session")
def tiny_xl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.tiny_stable_diffusion_xl(tmp_path_factory.mktemp("tiny-xl"))


@pytest.fixture(scope="session")
def tiny_sd3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.tiny_stable_diffusion_3(tmp_path_factory.mktemp("tiny-sd3"))


@pytest.fixture(scope="session")
def tiny_sd3_without_t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-sd3-without-t5")
    return tiny_models.tiny_stable_diffusion_3(folder, t5=False, dynamic_shifting=True)


@pytest.fixture(scope="session")
def tiny_flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.tiny_flux(tmp_path_factory.mktemp("tiny-flux"))


@pytest.fixture(scope="session")
def tiny_schnell(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FLUX that is not told its guidance."""
    return tiny_models.tiny_flux(tmp_path_factory.mktemp("tiny-schnell"), distilled_guidance=False)


@pytest.fixture(scope="session")
def dino_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vision model of pictures of 28 x 28 pixels, without captions."""
    import torch
    from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("dino")
    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    Dinov2Model(config).save_pretrained(folder)
    square = {"height": 28, "width": 28}
    BitImageProcessorPil(size={"shortest_edge": 32}, crop_size=square).save_pretrained(folder)
    return folder


@pytest.fixture
def script(tmp_path: Path) -> tuple[Path, str]:
    """A TorchScript file that gives a picture's mean of each channel, and its digest."""

    import torch

    class ChannelMeans(torch.nn.Module):
        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return pixels.mean(dim=(2, 3))

    path = tmp_path / "means.pt"
    torch.jit.script(ChannelMeans()).save(str(path))
    return path, hashlib.sha256(path.read_bytes()).hexdigest()
