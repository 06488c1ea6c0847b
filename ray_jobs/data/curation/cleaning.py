"""Measures of a picture: size, sharpness, contrast, brightness, perceptual hash and colours."""

import functools
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ray_jobs.config import CleaningConfig
from ray_jobs.pictures.reading import Picture, Rejected

SHARPNESS_SIDE = 256
# `at_least` of `read_picture` for pictures that are only measured. The sharpness of a JPEG reduced to this
# while decoding is within 8 % of the full one; reduced to 256 pixels, it is 40 % off.
FIRST_LOOK_SIDE = 2 * SHARPNESS_SIDE
DARK, BRIGHT = 8, 247
HASH_SIDE = 32
COLOUR_FIELDS = 4


@dataclass(frozen=True)
class ImageStats:
    """Measures of a picture, kept after its pixels are released."""

    width: int  # pixels, upright
    height: int
    sharpness: float  # variance of the Laplacian of the luma
    contrast: float  # standard deviation of the luma, of 0..255
    dark: float  # share of pixels with a luma below DARK
    bright: float  # share of pixels with a luma above BRIGHT
    hash: int  # perceptual, 64 bits, unsigned: near duplicates differ by few bits
    colours: bytes  # RGB means of COLOUR_FIELDS x COLOUR_FIELDS fields, row by row, uint8


@dataclass(frozen=True, eq=False)
class QualityCheck:
    """Threshold and histogram of one measure."""

    reason: str
    field: str  # field in data.cleaning
    below: bool  # a picture is rejected below the threshold, else above it
    edges: np.ndarray  # edges of the histogram's bins; the outer two are open


QUALITY_CHECKS = {
    "contrast": QualityCheck("near_constant", "min_contrast", True, np.linspace(0, 96, 25)),
    "dark": QualityCheck("too_dark", "max_dark", False, np.linspace(0, 1, 25)),
    "bright": QualityCheck("too_bright", "max_bright", False, np.linspace(0, 1, 25)),
    "sharpness": QualityCheck("blurred", "min_sharpness", True, np.geomspace(0.1, 1e5, 25)),
}


def measure(picture: Picture) -> ImageStats:
    """Measure a picture; decoding with `at_least=FIRST_LOOK_SIDE` gives nearly the same measures.

    Larger pictures are reduced, so that one sharpness threshold serves all sizes. Smaller ones are not
    enlarged: that adds no detail, so small crisp pictures would count as blurred. `min_side` limits their
    size.
    """
    image = picture.image
    scale = SHARPNESS_SIDE / min(image.size)
    if scale < 1:
        size = (round(image.width * scale), round(image.height * scale))
        image = image.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0)
    grey = image.convert("L")  # ITU-R BT.601 luma
    luma = np.asarray(grey, dtype=np.float32)
    fields = image.resize((COLOUR_FIELDS, COLOUR_FIELDS), Image.Resampling.BOX)
    return ImageStats(
        width=picture.width,
        height=picture.height,
        sharpness=_sharpness(luma),
        contrast=float(luma.std()),
        dark=float((luma < DARK).mean()),
        bright=float((luma > BRIGHT).mean()),
        hash=_perceptual_hash(grey),
        colours=fields.tobytes(),
    )


def _sharpness(luma: np.ndarray) -> float:
    """Variance of the Laplacian with four neighbours (Pech-Pacheco et al., ICPR 2000); edges are repeated."""
    padded = np.pad(luma, 1, mode="edge")
    neighbours = padded[:-2, 1:-1] + padded[2:, 1:-1] + padded[1:-1, :-2] + padded[1:-1, 2:]
    return float((neighbours - 4 * luma).var())


def _perceptual_hash(grey: Image.Image) -> int:
    """pHash, a perceptual hash by DCT of a 32 x 32 luma.

    Each bit states if one of 8 x 8 low frequencies is above their median (Zauner, "Implementation and
    Benchmarking of Perceptual Image Hash Functions", 2010, section 3.2). Row 0 and column 0 of the DCT, the
    constant term and variation in one direction only, are excluded, as in pHash.
    """
    small = grey.resize((HASH_SIDE, HASH_SIDE), Image.Resampling.LANCZOS)
    frequencies = _cosines() @ np.asarray(small, dtype=np.float64) @ _cosines().T
    # Rounded, since in a flat or symmetrical picture errors of 1e-14 would set the bits.
    bits = frequencies.round(3) > np.median(frequencies.round(3))
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


@functools.cache
def _cosines() -> np.ndarray:
    """Rows 1 to 8 of the orthonormal DCT-II of HASH_SIDE values: float64, 8 x HASH_SIDE."""
    rows, columns = np.mgrid[1:9, :HASH_SIDE]
    return np.cos(np.pi / HASH_SIDE * (columns + 0.5) * rows) * np.sqrt(2 / HASH_SIDE)


def check_size(width: int, height: int, config: CleaningConfig, which: str = "") -> None:
    """Check the size of a file's picture, in pixels.

    Args:
        which: beginning of the detail, for a picture that is not the row's own.

    Raises:
        Rejected: `too_small` or `extreme_aspect_ratio`.
    """
    shorter, longer = sorted((width, height))
    if shorter < config.min_side:
        raise Rejected(
            "too_small", f"{which}shorter side {shorter} is below data.cleaning.min_side {config.min_side}"
        )
    if longer > config.max_aspect_ratio * shorter:
        raise Rejected(
            "extreme_aspect_ratio",
            f"{which}aspect ratio {longer / shorter:.4g} is above "
            f"data.cleaning.max_aspect_ratio {config.max_aspect_ratio:g}",
        )


def check(measures: ImageStats, config: CleaningConfig) -> None:
    """Check the measures; of several faults the first in QUALITY_CHECKS counts, flat before blurred.

    Raises:
        Rejected: `near_constant`, `too_dark`, `too_bright` or `blurred`.
    """
    for name, judged in QUALITY_CHECKS.items():
        threshold = getattr(config, judged.field)
        value = getattr(measures, name)
        if threshold is None or (value >= threshold if judged.below else value <= threshold):
            continue
        side = "below" if judged.below else "above"
        raise Rejected(
            judged.reason, f"{name} {value:.4g} is {side} data.cleaning.{judged.field} {threshold:g}"
        )


def histogram(name: str, values: np.ndarray) -> np.ndarray:
    """Count `values` (any shape) of the measure `name` in its bins; counts of a dataset's parts add up.

    The first and last bins include values beyond the edges.

    Returns:
        int64, one count per bin: len(QUALITY_CHECKS[name].edges) - 1.
    """
    edges = QUALITY_CHECKS[name].edges
    return np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0].astype(np.int64)
