"""Interface of the feature networks, which map pictures to feature vectors. Pure PyTorch."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch.nn.functional import interpolate


@contextmanager
def full_precision() -> Iterator[None]:
    """Calculate in float32 throughout. GPUs since Ampere round the factors of convolutions to 10 bits (TF32),
    so that a score would depend on the card."""
    backends: tuple[Any, ...] = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = False
        yield
    finally:
        for backend, allowed in zip(backends, before, strict=True):
            backend.allow_tf32 = allowed


@dataclass(frozen=True, eq=False)
class FeatureNetwork(ABC):
    """A frozen network in evaluation mode.

    Attributes:
        digest: SHA-256 of everything that the features depend on and the program does not fix itself: the
            weights file and, if configured by the user, the preprocessing.
    """

    name: str
    digest: str
    device: torch.device
    num_features: int

    @property
    def identity(self) -> str:
        """Identity recorded with every score: name@sha256:first 12 digits."""
        return f"{self.name}@sha256:{self.digest[:12]}"

    @property
    def resizing(self) -> str:
        """Description of how the network's input is resized, for display."""
        return "not resized"

    @property
    def modules(self) -> list[torch.nn.Module]:
        """The modules with its weights."""
        return [each for each in vars(self).values() if isinstance(each, torch.nn.Module)]

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Features of a batch of pictures.

        Args:
            images: uint8, N x 3 x H x W.

        Returns:
            float32, N x num_features, on the CPU.

        Raises:
            ValueError: `images` are not uint8 with three channels.
        """
        return self.on_device(images).float().cpu()

    @torch.inference_mode()
    @full_precision()
    def on_device(self, images: torch.Tensor) -> torch.Tensor:
        """Return `features` where they are computed, which may be on the meta device: float."""
        require_pictures(images)
        return self._features(images.to(self.device))

    @abstractmethod
    def _features(self, images: torch.Tensor) -> torch.Tensor:
        """Features of checked pictures (uint8, N x 3 x H x W, on `device`): float, N x num_features."""


@dataclass(frozen=True)
class Preprocessing:
    """Preprocessing of pictures with values 0 to 255 for a network: (resized - mean) / std.

    The whole picture is resized to a square without cropping, so that all of its content is measured.

    Attributes:
        size: side of the square in pixels.
        interpolation: mode of PyTorch's `interpolate`, with half-pixel centres and antialiased downscaling.
        mean: mean per channel, in the range 0 to 255.
        std: standard deviation per channel, in the same range.
    """

    size: int
    interpolation: Literal["bilinear", "bicubic"]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @property
    def resizing(self) -> str:
        """Description of the resizing, for display."""
        return whole_to(self.size)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Convert uint8, N x 3 x H x W to float32, N x 3 x size x size."""
        shape = (self.size, self.size)
        pixels = interpolate(
            images.float(), shape, mode=self.interpolation, align_corners=False, antialias=True
        )
        # Cubic interpolation overshoots at edges; a picture's values end at 0 and 255.
        mean, std = (pixels.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (pixels.clamp(0, 255) - mean) / std


def whole_to(size: int) -> str:
    """Describe resizing a whole picture to a square, for `FeatureNetwork.resizing`."""
    return f"resized whole to {size} x {size} pixels, whatever its proportions"


def require_pictures(images: torch.Tensor) -> None:
    """Raise ValueError if `images` are not uint8, N x 3 x H x W."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images: uint8, N x 3 x H x W; not {images.dtype}, {tuple(images.shape)}")


def read_checked(path: Path, *, field: str, mend: str, allowed: set[str]) -> tuple[bytes, str]:
    """Read a file's bytes and their SHA-256.

    A network must be loaded from these bytes only, so that the file cannot change in between.

    Args:
        field: setting that names the file.
        mend: instruction to the user for a missing or wrong file.
        allowed: accepted digests.

    Raises:
        ValueError: the file is missing, or its digest is not accepted.
    """
    if not path.is_file():
        raise ValueError(f"{field}: {path}: no such file; {mend}")
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if digest not in allowed:
        raise ValueError(f"{field}: {path} is not a known feature network (sha256 {digest}); {mend}")
    return content, digest


def require_digest(path: str, digest: str, expected: str | None, field: str) -> None:
    """Raise ValueError if a network's digest differs from the setting `<field without .path>.sha256`."""
    if expected and expected.lower() != digest:
        raise ValueError(
            f"{field.removesuffix('.path')}.sha256: {path} has {digest}, not {expected}; take the file that "
            "is meant, or correct the digest"
        )


def freeze(module: torch.nn.Module, device: torch.device) -> None:
    """Move a network to a device, set evaluation mode and disable gradients."""
    module.to(device).eval()
    for parameter in module.parameters():
        parameter.requires_grad_(False)
