"""What the unit tests share."""

import hashlib
from pathlib import Path

import pytest


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
