"""Random augmentation of training pictures: flip, rotation, scale, crop position, colour.

Drawing and applying are separate: `Changes.draw` reads no picture, `apply` draws no random numbers.
"""

import hashlib
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageEnhance

from ray_jobs.config import AugmentationConfig
from ray_jobs.data.encoding.geometry import Fitted, Size, crop_offset, largest_crop

HUES = 255  # steps of Pillow's hue channel around the circle: its 0 and its 255 are both red


def row_generator(seed: int, digest: str, draw: int) -> np.random.Generator:
    """Random generator for one row, independent between seeds, pictures and draws.

    It uses only SHA-256, SeedSequence and Philox, all with fixed streams, so that a row's augmentation is the
    same on every machine and after every restart.

    Args:
        seed: any integer.
        digest: SHA-256 of the picture's file, in hexadecimal.
        draw: epoch or variant.
    """
    key = hashlib.sha256(f"{seed}:{digest}:{draw}".encode()).digest()
    sequence = np.random.SeedSequence(int.from_bytes(key, "big"))
    return np.random.Generator(np.random.Philox(sequence))


@dataclass(frozen=True)
class Changes:
    """Augmentation of one picture; the defaults change nothing.

    Attributes:
        flip: True to flip horizontally.
        degrees: rotation, anticlockwise.
        side: side of the crop, as a share of the largest that fits.
        place: position of the crop from left and top; 0 and 1 are the limits of its range.
        brightness: factor of every channel.
        contrast: factor of the distance from the mean luma.
        saturation: factor of the distance from grey.
        hue: shift, as a share of the circle.
    """

    flip: bool = False
    degrees: float = 0.0
    side: float = 1.0
    place: tuple[float, float] = (0.5, 0.5)
    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0
    hue: float = 0.0

    @staticmethod
    def draw(config: AugmentationConfig, generator: np.random.Generator) -> "Changes":
        """Draw the changes; the count of draws is fixed, so that one augmentation does not affect another."""
        drawn = generator.random(13).tolist()
        flip, rotate, crop, scale, colour, angle, across, down, smaller = drawn[:9]
        brightness, contrast, saturation, hue = (
            2 * number - 1 if colour < config.colour else 0.0 for number in drawn[9:]
        )
        return Changes(
            flip=flip < config.flip,
            degrees=config.max_degrees * (2 * angle - 1) if rotate < config.rotate else 0.0,
            side=1 - (1 - config.min_scale) * smaller if scale < config.scale else 1.0,
            place=(across, down) if crop < config.crop else (0.5, 0.5),
            brightness=1 + config.max_brightness * brightness,
            contrast=1 + config.max_contrast * contrast,
            saturation=1 + config.max_saturation * saturation,
            hue=config.max_hue * hue,
        )


def augment(
    image: Image.Image,
    target: Size,
    config: AugmentationConfig,
    generator: np.random.Generator,
    *,
    original: Size | None = None,
) -> Fitted:
    """Draw changes and apply them; without changes the result equals `geometry.fit`.

    Args:
        image: RGB, upright.
        target: size of the result.
        config: probabilities and strengths.
        generator: see `row_generator`; 13 numbers are drawn from it.
        original: size of the upright picture, if `image` was decoded at a reduced scale.
    """
    return apply(image, target, Changes.draw(config, generator), original=original)


def apply(image: Image.Image, target: Size, changes: Changes, *, original: Size | None = None) -> Fitted:
    """Flip, rotate, crop and resize `image` (RGB, upright), then change its colours.

    The crop offset is measured after the flip. For a rotated picture it starts at the corner of the smallest
    upright rectangle around the whole picture.
    """
    assert image.mode == "RGB", image.mode
    original = original or image.size
    if changes.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    cropped, offset = _crop(image, target, changes)
    return Fitted(
        pixels=np.asarray(_change_colours(cropped, changes)),
        original_size=original[::-1],
        crop=offset,
        target_size=target[::-1],
    )


def _crop(image: Image.Image, target: Size, changes: Changes) -> tuple[Image.Image, tuple[int, int]]:
    """Return the crop at `target` size, and its offset. All its pixels are inside the picture.

    In the frame of a W x H picture rotated by a, an upright w x h crop is itself rotated, and spans
    w cos|a| + h sin|a| of W and w sin|a| + h cos|a| of H. The largest crop of the target's aspect ratio fills
    one of them. The remainder of the other, and more for a smaller crop, is the range of its position.
    """
    angle = math.radians(changes.degrees)
    cos, sin = math.cos(angle), math.sin(angle)

    def extent(width: float, height: float) -> tuple[float, float]:
        return width * cos + height * abs(sin), width * abs(sin) + height * cos

    upright = largest_crop(image.size, target)
    covered = extent(*upright)
    share = changes.side * min(image.width / covered[0], image.height / covered[1])
    crop = width, height = share * upright[0], share * upright[1]
    covered = extent(width, height)
    left, top = ((image.size[axis] - covered[axis]) * changes.place[axis] for axis in (0, 1))
    if changes.degrees == 0:
        box = (left, top, left + width, top + height)
        cropped = image.resize(target, Image.Resampling.LANCZOS, box=box)
        return cropped, crop_offset((left, top), crop, target)
    centre = left + covered[0] / 2, top + covered[1] / 2
    cropped = _turned(image, centre, crop, angle).resize(target, Image.Resampling.LANCZOS)
    # Rotate the vector between the picture's and the crop's centres to get the rectangle's corner.
    x, y = centre[0] - image.width / 2, centre[1] - image.height / 2
    around = extent(*image.size)
    left = (around[0] - width) / 2 + x * cos + y * sin
    top = (around[1] - height) / 2 - x * sin + y * cos
    return cropped, crop_offset((left, top), crop, target)


def _turned(
    image: Image.Image, centre: tuple[float, float], crop: tuple[float, float], angle: float
) -> Image.Image:
    """Return the crop around `centre` (x, y in the picture) after rotating the picture by `angle`.

    It has the scale of `image`, up to rounding to whole pixels (bicubic). Resizing it afterwards uses no
    pixels outside the crop, unlike resizing a region of a fully rotated picture, which does at its edges.

    Args:
        angle: angle in radians, anticlockwise.
    """
    size = max(1, round(crop[0])), max(1, round(crop[1]))
    across, down = crop[0] / size[0], crop[1] / size[1]
    cos, sin = math.cos(angle), math.sin(angle)
    matrix = (
        cos * across,
        -sin * down,
        centre[0] - (cos * crop[0] - sin * crop[1]) / 2,
        sin * across,
        cos * down,
        centre[1] - (sin * crop[0] + cos * crop[1]) / 2,
    )
    return image.transform(size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC)


def _change_colours(image: Image.Image, changes: Changes) -> Image.Image:
    image = ImageEnhance.Brightness(image).enhance(changes.brightness)
    image = ImageEnhance.Contrast(image).enhance(changes.contrast)
    image = ImageEnhance.Color(image).enhance(changes.saturation)
    steps = round(changes.hue * HUES)
    if steps == 0:  # converting to 8-bit HSV and back would lose some levels
        return image
    hue, saturation, value = image.convert("HSV").split()
    hue = hue.point([(level + steps) % HUES for level in range(256)])
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")
