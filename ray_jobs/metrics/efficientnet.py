"""EfficientNet-Lite0: a lightweight second feature network, and a classifier of ImageNet's 1,000 classes.

The architecture is EfficientNet-B0 (Tan & Le, arXiv 1905.11946, table 1) without squeeze-and-excitation and
with ReLU6 instead of Swish, as published by Google for small devices in 2020. Pure PyTorch.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load

from ray_jobs.metrics.feature_network import (
    FeatureNetwork,
    Preprocessing,
    freeze,
    full_precision,
    read_checked,
    require_pictures,
)

# sha256 of the safetensors file that weights/fetch.py writes.
DIGEST = "162cab1588fef51b5c21ded8c39f300b7865dc4826c4adb0db094486ac452864"
NAME = "efficientnet-lite0"
FIELD = "evaluate.second_network.path"  # the setting that names the file
# Per stage: kernel size, stride of the first block, expansion, channels, and number of blocks.
STAGES = (
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)
STEM, NUM_FEATURES, NUM_CLASSES = 32, 1280, 1000
# Input of the published network. It was trained on crops; here it measures whole pictures.
PREPROCESSING = Preprocessing(224, "bicubic", mean=(127.0,) * 3, std=(128.0,) * 3)


def convolution(
    channels: int, out: int, kernel: int = 1, stride: int = 1, *, groups: int = 1, activation: bool = True
) -> torch.nn.Sequential:
    """Convolution, batch normalisation and ReLU6.

    Padding is TensorFlow's "SAME" for an even side: at stride 2, one pixel less before the picture than after
    it.
    """
    around = kernel - stride
    before, after = around // 2, around - around // 2
    layers: list[torch.nn.Module] = [torch.nn.ZeroPad2d((before, after, before, after))] if around > 0 else []
    layers.append(torch.nn.Conv2d(channels, out, kernel, stride, groups=groups, bias=False))
    layers.append(torch.nn.BatchNorm2d(out, eps=1e-3))
    if activation:
        layers.append(torch.nn.ReLU6())
    return torch.nn.Sequential(*layers)


class InvertedBottleneck(torch.nn.Sequential):
    """Expand, convolve depthwise, project; the input is added if the shapes are equal."""

    def __init__(self, channels: int, out: int, kernel: int, stride: int, expansion: int) -> None:
        wide = channels * expansion
        super().__init__(
            *([convolution(channels, wide)] if expansion > 1 else []),
            convolution(wide, wide, kernel, stride, groups=wide),
            convolution(wide, out, activation=False),
        )
        self.is_residual = stride == 1 and channels == out

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        output = super().forward(input)
        return output + input if self.is_residual else output


class EfficientNetLite0(torch.nn.Module):
    """Map pictures (float32, N x 3 x 224 x 224) to pooled features (N x 1280); `classifier` gives logits."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, channels = convolution(3, STEM, kernel=3, stride=2), STEM
        self.blocks = torch.nn.Sequential()
        for kernel, stride, expansion, out, count in STAGES:
            for number in range(count):
                self.blocks.append(
                    InvertedBottleneck(channels, out, kernel, 1 if number else stride, expansion)
                )
                channels = out
        self.head = convolution(channels, NUM_FEATURES)
        self.classifier = torch.nn.Linear(NUM_FEATURES, NUM_CLASSES)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.stem(pixels))).mean(dim=(2, 3))


@dataclass(frozen=True, eq=False)
class EfficientNet(FeatureNetwork):
    """Pooled features of a picture resized to 224 x 224 (bicubic) and normalised to (value - 127) / 128."""

    module: EfficientNetLite0

    @property
    def resizing(self) -> str:
        return PREPROCESSING.resizing

    def _features(self, images: torch.Tensor) -> torch.Tensor:
        return self.module(PREPROCESSING(images).contiguous(memory_format=torch.channels_last))

    @torch.inference_mode()
    def probabilities(self, images: torch.Tensor) -> torch.Tensor:
        """Probabilities of ImageNet's 1,000 classes, for the Inception Score.

        Args:
            images: uint8, N x 3 x H x W.

        Returns:
            float32, N x 1000, on the CPU; each row sums to 1.
        """
        require_pictures(images)
        return self.classes(self._features(images.to(self.device)))

    @torch.inference_mode()
    @full_precision()
    def classes(self, features: torch.Tensor) -> torch.Tensor:
        """Class probabilities as from `probabilities`, computed from `features` (float, N x 1280)."""
        return self.module.classifier(features.to(self.device)).softmax(dim=1).float().cpu()


def read_efficientnet(path: str | Path, field: str = FIELD) -> tuple[bytes, str]:
    """Read the file's bytes and their digest; errors as for `load_efficientnet`."""
    return read_checked(
        Path(path), field=field, mend="`make setup` or `diffray networks` fetches it", allowed={DIGEST}
    )


def load_efficientnet(
    path: str | Path, device: str | torch.device = "cpu", *, field: str = FIELD
) -> EfficientNet:
    """Read the network from the safetensors file that `make setup` fetches.

    Raises:
        ValueError: the file is missing, or its digest is not the expected one.
    """
    device = torch.device(device)
    content, digest = read_efficientnet(path, field)
    module = EfficientNetLite0()
    module.load_state_dict(load(content))
    freeze(module, device)
    return EfficientNet(NAME, digest, device, NUM_FEATURES, module)
