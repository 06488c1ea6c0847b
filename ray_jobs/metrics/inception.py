"""The feature network of FID: Inception v3 as it was trained in 2015. Pure PyTorch."""

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path

import torch

# Digest of the TorchScript file -> name of the network in it. A file that is not listed is never loaded:
# TorchScript is code, and a score is comparable only with scores of the same network.
KNOWN_NETWORKS = {
    "7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34": "inception-2015-12-05",
}
INPUT_SIZE = 299


def interpolation_matrix(size_in: int, size_out: int) -> torch.Tensor:
    """Linear interpolation along one axis, as TensorFlow 1's `resize_bilinear(align_corners=False)`.

    Output i is read at i * size_in / size_out, without the half-pixel offset that `interpolate` of PyTorch
    adds; past the last pixel the last pixel repeats. Published FID scores are computed on pictures that
    were resized in this way (Parmar et al., arXiv 2104.11222, section 3).

    Returns:
        float32, size_out x size_in; each row sums to 1.
    """
    position = torch.arange(size_out, dtype=torch.float64) * (size_in / size_out)
    low = position.floor().long().clamp(max=size_in - 1)
    high = (low + 1).clamp(max=size_in - 1)
    share = position - low
    matrix = torch.zeros(size_out, size_in, dtype=torch.float64)
    rows = torch.arange(size_out)
    matrix.index_put_((rows, low), 1 - share, accumulate=True)
    matrix.index_put_((rows, high), share, accumulate=True)
    return matrix.float()


def resize(images: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Bilinear resizing, as two matrix products: N x C x H x W to float32, N x C x height x width."""
    down = interpolation_matrix(images.shape[2], height).to(images.device)
    across = interpolation_matrix(images.shape[3], width).to(images.device)
    return down @ images.float() @ across.T


@dataclass(frozen=True, eq=False)
class FeatureNetwork:
    """A frozen network that turns pictures into feature vectors."""

    name: str
    digest: str  # sha256 of the file
    module: torch.jit.ScriptModule
    device: torch.device
    num_features: int = 2048

    @property
    def identity(self) -> str:
        """What is recorded with every score: name@sha256:first 12 digits."""
        return f"{self.name}@sha256:{self.digest[:12]}"

    @torch.inference_mode()
    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Features of a batch of pictures.

        Args:
            images: uint8, N x 3 x H x W.

        Returns:
            float32, N x num_features, on the CPU.

        Raises:
            ValueError: if `images` are not uint8 with three channels.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images: uint8, N x 3 x H x W; not {images.dtype}, {tuple(images.shape)}")
        pixels = resize(images.to(self.device), INPUT_SIZE, INPUT_SIZE)
        # The order of memory in which the CPU's 1x1 convolutions and pools are fast: 1.3 to 1.4 times as
        # many pictures a second, features equal to 1e-6. torch.jit.freeze added nothing to that.
        pixels = ((pixels - 128) / 128).contiguous(memory_format=torch.channels_last)
        return self.module(pixels).float().cpu()


def load_feature_network(path: str | Path, device: str | torch.device = "cpu") -> FeatureNetwork:
    """Read the network from a TorchScript file whose digest is known.

    Raises:
        ValueError: if the file is missing or another one than it should be; it is then not loaded.
    """
    path, device = Path(path), torch.device(device)
    if not path.is_file():
        raise ValueError(f"evaluate.feature_network: no such file: {path}; `make setup` fetches it")
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if digest not in KNOWN_NETWORKS:
        raise ValueError(
            f"evaluate.feature_network: {path} is not a known feature network (sha256 {digest[:12]}...);"
            " remove it and run `make setup`"
        )
    # From the bytes that were checked, so that the file cannot change in between.
    module = torch.jit.load(io.BytesIO(content), map_location=device).eval()
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    return FeatureNetwork(KNOWN_NETWORKS[digest], digest, module, device)
