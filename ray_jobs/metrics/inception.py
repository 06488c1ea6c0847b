"""FID's feature network: Inception v3 as trained in 2015. Pure PyTorch."""

import io
from dataclasses import dataclass
from pathlib import Path

import torch

from ray_jobs.metrics.feature_network import FeatureNetwork, freeze, read_checked, whole_to

# Digest of the TorchScript file -> name of its network. Other files are never loaded: TorchScript is code,
# and a score is comparable only with scores of the same network.
KNOWN_NETWORKS = {
    "7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34": "inception-2015-12-05",
}
# The same of the file with the network's last layer, which pytorch-fid and torch-fidelity publish.
KNOWN_CLASSIFIERS = {
    "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2": "inception-2015-12-05-classes",
}
FIELD = "evaluate.feature_network"  # the setting that names the file
CLASSIFIER = "evaluate.inception_classes"  # the setting that names the other file
INPUT_SIZE = 299
NUM_FEATURES = 2048
NUM_CLASSES = 1008


def interpolation_matrix(size_in: int, size_out: int) -> torch.Tensor:
    """Matrix of linear interpolation on one axis, as TensorFlow 1's `resize_bilinear(align_corners=False)`.

    Output i is sampled at i * size_in / size_out, without the half-pixel offset of PyTorch's `interpolate`;
    the last pixel repeats past the edge. Published FID scores are computed on pictures resized in this way
    (Parmar et al., arXiv 2104.11222, section 3).

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
    """Resize bilinearly by two matrix products: N x C x H x W to float32, N x C x height x width."""
    down = interpolation_matrix(images.shape[2], height).to(images.device)
    across = interpolation_matrix(images.shape[3], width).to(images.device)
    return down @ images.float() @ across.T


@dataclass(frozen=True, eq=False)
class Inception(FeatureNetwork):
    """Inception's pool3 layer: 2,048 features of a picture resized to 299 x 299, as (value - 128) / 128."""

    module: torch.jit.ScriptModule

    @property
    def resizing(self) -> str:
        return whole_to(INPUT_SIZE)

    def _features(self, images: torch.Tensor) -> torch.Tensor:
        pixels = resize(images, INPUT_SIZE, INPUT_SIZE)
        # Channels last is faster for 1x1 convolutions and pools on the CPU: 1.3 to 1.4 times as many pictures
        # per second, with features equal to 1e-6. torch.jit.freeze gave no further speed-up.
        pixels = ((pixels - 128) / 128).contiguous(memory_format=torch.channels_last)
        return self.module(pixels)


def read_inception(path: str | Path, field: str = FIELD) -> tuple[bytes, str]:
    """Read the file's bytes and their digest; errors as for `load_inception`."""
    return read_checked(
        Path(path),
        field=field,
        mend="`make setup` or `diffray networks` fetches it",
        allowed=set(KNOWN_NETWORKS),
    )


def load_inception(path: str | Path, device: str | torch.device = "cpu", *, field: str = FIELD) -> Inception:
    """Read the network from a TorchScript file whose digest is known.

    Raises:
        ValueError: the file is missing, or its digest is not known; it is then not loaded.
    """
    device = torch.device(device)
    content, digest = read_inception(path, field)
    module = torch.jit.load(io.BytesIO(content), map_location=device)
    freeze(module, device)
    return Inception(KNOWN_NETWORKS[digest], digest, device, NUM_FEATURES, module)


@dataclass(frozen=True)
class InceptionClasses:
    """The classes of Inception's features, for the Inception Score as published.

    Published scores leave out the layer's bias, as the program of Salimans et al. (arXiv 1606.03498) did.

    Attributes:
        weights: float32, 1008 x 2048, on the CPU.
    """

    name: str
    digest: str
    weights: torch.Tensor

    @property
    def identity(self) -> str:
        """Identity recorded with the score, as of a `FeatureNetwork`."""
        return f"{self.name}@sha256:{self.digest[:12]}"

    @torch.inference_mode()
    def probabilities(self, features: torch.Tensor) -> torch.Tensor:
        """Return class probabilities: float32, N x 1008, from `Inception.features` (float, N x 2048)."""
        return (features.float() @ self.weights.T).softmax(dim=1)


def read_classes(path: str | Path, field: str = CLASSIFIER) -> tuple[bytes, str]:
    """Read the file's bytes and their digest; errors as for `load_classes`."""
    mend = "give pt_inception-2015-12-05-6726825d.pth of pytorch-fid, which torch-fidelity has too"
    return read_checked(Path(path), field=field, mend=mend, allowed=set(KNOWN_CLASSIFIERS))


def load_classes(path: str | Path, field: str = CLASSIFIER) -> InceptionClasses:
    """Read the classes from the file of the whole network, whose digest is known.

    Raises:
        ValueError: the file is missing, or its digest is not known; it is then not loaded.
    """
    content, digest = read_classes(path, field)
    layers = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    weights = layers["fc.weight"].float()
    assert weights.shape == (NUM_CLASSES, NUM_FEATURES)
    return InceptionClasses(KNOWN_CLASSIFIERS[digest], digest, weights.clone())
