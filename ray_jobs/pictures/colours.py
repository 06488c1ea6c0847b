"""Convert a file's pixels to 8-bit sRGB: high-bit-depth grey, transparency, colour profiles."""

import functools
import io

import numpy as np
from PIL import ExifTags, Image, ImageCms

from ray_jobs.pictures.png import MAX_PROFILE

NEAR = 2  # levels of 255 by which an sRGB profile may change a colour; rounding alone changes it by 1


def eight_bits(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Return the colours in mode L, RGB or CMYK, and the alpha channel in mode L (None if opaque)."""
    if image.mode.startswith("I") or image.mode == "F":
        return _grey_from_deep(image), None
    if image.has_transparency_data:
        if image.mode == "La":
            image = image.convert("LA")  # Pillow's only conversion from premultiplied grey
        mode = "LA" if image.mode in ("L", "LA") else "RGBA"
        with_alpha = image.convert(mode)
        return with_alpha.convert(mode[:-1]), with_alpha.getchannel("A")
    return image if image.mode in ("L", "RGB", "CMYK") else image.convert("RGB"), None


def _grey_from_deep(image: Image.Image) -> Image.Image:
    """Scale 16-bit, 32-bit and float grey to 0..255; Pillow's own conversion would clip it at 255.

    White is 65535 for 16 bits. For 32-bit integers and floats it is not defined: it is then the smallest
    usual white that no value exceeds, or else the brightest value. Negative and non-finite values become
    black.
    """
    values = np.asarray(image).astype(np.float32)
    np.nan_to_num(values, copy=False, nan=0, posinf=0, neginf=0)
    whites = (65535,) if image.mode.startswith("I;16") else (1, 255, 65535)
    brightest = float(values.max())
    white = next((white for white in whites if brightest <= white), brightest)
    grey = np.rint(np.clip(values / white, 0, 1) * 255).astype(np.uint8)
    tags = getattr(image, "tag_v2", {})
    if tags.get(ExifTags.Base.PhotometricInterpretation) == 0:
        grey = 255 - grey  # "white is zero": Pillow handles it for 8 bits only
    return Image.fromarray(grey)


def to_srgb(image: Image.Image, profile: object) -> Image.Image:
    """Convert L, RGB or CMYK to sRGB by the file's embedded profile, or else by Pillow's default."""
    # A broken TIFF may hold numbers in place of a profile.
    usable = isinstance(profile, bytes) and len(profile) < MAX_PROFILE
    transform = _transform(profile, image.mode) if usable else None
    return transform.apply(image) if transform else image.convert("RGB")


@functools.lru_cache(maxsize=8)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Return the transform from an ICC profile to sRGB; None if there is none to apply.

    That is the case for sRGB itself, whose transform would cost as much as decoding, and for a profile that
    is broken or of another colour space than the image: like browsers, use the image without it. An sRGB
    profile is recognised by its colours, because its description may contain any name.
    """
    try:
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        transform = ImageCms.buildTransform(opened, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError):
        return None
    return None if mode == "RGB" and _changes_nothing(transform) else transform


def _changes_nothing(transform: ImageCms.ImageCmsTransform) -> bool:
    """Return whether a transform keeps a grid over all colours unchanged to within NEAR levels."""
    levels = np.linspace(0, 255, 16).round().astype(np.uint8)
    colours = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(64, 64, 3)
    moved = np.asarray(transform.apply(Image.fromarray(colours)), np.int16) - colours
    return int(np.abs(moved).max()) <= NEAR
