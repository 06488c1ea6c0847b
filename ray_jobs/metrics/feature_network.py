"""What turns pictures into feature vectors: the interface that every feature network has. Pure PyTorch."""

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch.nn.functional import interpolate


@dataclass(frozen=True, eq=False)
class FeatureNetwork(ABC):
    """A frozen network in evaluation mode.

    Attributes:
        digest: sha256 of all that the features depend on and the program does not fix itself: the weights'
            file and, where a user states it, how a picture is prepared.
    """

    name: str
    digest: str
    device: torch.device
    num_features: int

    @property
    def identity(self) -> str:
        """What is recorded with every score: name@sha256:first 12 digits."""
        return f"{self.name}@sha256:{self.digest[:12]}"

    @property
    def resizing(self) -> str:
        """What becomes of a picture's size before the network sees it, for a person."""
        return "not resized"

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
        require_pictures(images)
        return self._features(images.to(self.device)).float().cpu()

    @abstractmethod
    def _features(self, images: torch.Tensor) -> torch.Tensor:
        """Features of checked pictures (uint8, N x 3 x H x W, on `device`): float, N x num_features."""


@dataclass(frozen=True)
class Preprocessing:
    """What is done to a picture's values, 0 to 255, before a network sees them: (resized - mean) / std.

    The whole picture is resized to a square, without cropping, so that nothing of what was drawn is left out.

    Attributes:
        size: pixels a side.
        interpolation: of PyTorch's `interpolate`, with half-pixel centres and, downwards, antialiasing.
        mean: a channel, in the picture's range of 0 to 255.
        std: likewise.
    """

    size: int
    interpolation: Literal["bilinear", "bicubic"]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @property
    def resizing(self) -> str:
        """What becomes of a picture's size, for a person."""
        return whole_to(self.size)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Of uint8, N x 3 x H x W: float32, N x 3 x size x size."""
        shape = (self.size, self.size)
        pixels = interpolate(
            images.float(), shape, mode=self.interpolation, align_corners=False, antialias=True
        )
        # Cubic interpolation overshoots at edges; a picture's values end at 0 and 255.
        mean, std = (pixels.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (pixels.clamp(0, 255) - mean) / std


def whole_to(size: int) -> str:
    """The words for `FeatureNetwork.resizing` where a whole picture becomes a square."""
    return f"resized whole to {size} x {size} pixels, whatever its proportions"


def require_pictures(images: torch.Tensor) -> None:
    """Raises ValueError if `images` are not uint8, N x 3 x H x W."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images: uint8, N x 3 x H x W; not {images.dtype}, {tuple(images.shape)}")


def read_checked(path: Path, *, field: str, mend: str, allowed: set[str]) -> tuple[bytes, str]:
    """A file's bytes and their sha256; only from these bytes may a network then be loaded, so that the file
    cannot change in between.

    Args:
        field: the setting that names the file.
        mend: what a person is told to do about a missing or a wrong file.
        allowed: digests, one of which the file has.

    Raises:
        ValueError: if the file is missing, or is another one.
    """
    if not path.is_file():
        raise ValueError(f"{field}: {path}: no such file; {mend}")
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if digest not in allowed:
        raise ValueError(f"{field}: {path} is not a known feature network (sha256 {digest}); {mend}")
    return content, digest


def require_digest(path: str, digest: str, expected: str | None, field: str) -> None:
    """Raises ValueError if a network has another digest than `<field without .path>.sha256` says."""
    if expected and expected.lower() != digest:
        raise ValueError(
            f"{field.removesuffix('.path')}.sha256: {path} has {digest}, not {expected}; take the file that "
            "is meant, or correct the digest"
        )


def freeze(module: torch.nn.Module, device: torch.device) -> None:
    """Bring a network to a device and into evaluation mode, without gradients."""
    module.to(device).eval()
    for parameter in module.parameters():
        parameter.requires_grad_(False)
