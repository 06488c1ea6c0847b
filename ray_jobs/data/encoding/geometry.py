"""Training shapes of pictures, and cropping and resizing to them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ray_jobs.config import ConfigError

Size = tuple[int, int]  # width, height in pixels


@dataclass(frozen=True)
class Fitted:
    """A picture at the training size, with SDXL's micro-conditioning (arXiv 2307.01952, section 2.2).

    Attributes:
        pixels: uint8, height x width x 3.
        original_size: height, width of the upright original picture.
        crop: top, left of the crop, in pixels of the whole picture resized to the scale of `pixels`; (0, 0)
            means that nothing is cut off at the top and left.
        target_size: height, width of `pixels`.
    """

    pixels: np.ndarray
    original_size: tuple[int, int]
    crop: tuple[int, int]
    target_size: tuple[int, int]

    @property
    def sizes(self) -> list[int]:
        """List of original height and width, top and left of the crop, target height and width."""
        return [*self.original_size, *self.crop, *self.target_size]


def bucket_shapes(resolution: int, *, multiple: int, max_aspect_ratio: float) -> list[Size]:
    """Shapes of nearly equal area, from portrait to landscape, to which pictures are cropped.

    There is one shorter side per multiple up to `resolution`, with the longer side that brings the area
    nearest to resolution^2. The relative difference of the area is thus at most multiple / (2 * resolution).
    It is smaller for longer shapes: half a multiple times the shorter side.

    Args:
        resolution: side of the square shape in pixels.
        multiple: divisor of every side in pixels.
        max_aspect_ratio: longer side / shorter side of the longest shape, at least 1.

    Returns:
        Sizes sorted by width / height, with the square in the middle; for every (w, h) there is (h, w).

    Raises:
        ConfigError: `resolution` is not divisible by `multiple`.
    """
    if resolution % multiple:
        below = resolution // multiple * multiple
        fitting = f"{below} or {below + multiple}" if below else f"{multiple}"
        raise ConfigError(
            f"data.resolution: {resolution} is not divisible by {multiple}, as data.buckets needs for "
            f"this model; use {fitting}"
        )
    lying: list[Size] = []
    for short in range(resolution, 0, -multiple):
        long = multiple * round(resolution**2 / (short * multiple))
        if long > max_aspect_ratio * short:
            break
        lying.append((long, short))
    return [(short, long) for long, short in reversed(lying[1:])] + lying


def nearest_bucket(size: Size, shapes: Sequence[Size]) -> Size:
    """Return the shape with the aspect ratio nearest to that of `size` in logarithm; the first if tied.

    Its largest crop keeps the largest share of the picture.
    """
    width, height = size

    def quotient(shape: Size) -> float:
        """Larger aspect ratio divided by the smaller; it grows with the difference of the logarithms."""
        across, down = width * shape[1], height * shape[0]
        return max(across, down) / min(across, down)

    return min(shapes, key=quotient)


def largest_crop(size: Size, target: Size) -> tuple[float, float]:
    """Width and height, in fractional pixels, of the largest crop with `target`'s aspect ratio."""
    width, height = size
    target_width, target_height = target
    if width * target_height >= height * target_width:
        return height * target_width / target_height, float(height)
    return float(width), width * target_height / target_width


def fit(image: Image.Image, target: Size, *, original: Size | None = None) -> Fitted:
    """Resize the largest centred crop of `target`'s aspect ratio, in one resampling (Lanczos).

    Args:
        image: RGB, upright.
        target: size of the result.
        original: size of the upright picture, if `image` was decoded at a reduced scale.
    """
    assert image.mode == "RGB", image.mode
    crop = largest_crop(image.size, target)
    left, top = ((image.size[axis] - crop[axis]) / 2 for axis in (0, 1))
    box = (left, top, left + crop[0], top + crop[1])
    return Fitted(
        pixels=np.asarray(image.resize(target, Image.Resampling.LANCZOS, box=box)),
        original_size=(original or image.size)[::-1],
        crop=crop_offset((left, top), crop, target),
        target_size=target[::-1],
    )


def crop_offset(left_top: tuple[float, float], crop: tuple[float, float], target: Size) -> tuple[int, int]:
    """Top and left of a crop in the resized picture.

    Args:
        left_top: left and top of the crop, in pixels of the picture before resizing.
        crop: width and height of the crop there.
        target: width and height of the crop after resizing.
    """
    left, top = left_top
    return round(top * target[1] / crop[1]), round(left * target[0] / crop[0])
