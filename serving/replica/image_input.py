"""Decode the images that clients send into the engine's input. They are untrusted."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ray_jobs.pictures import reading
from serving.schemas import APIError

if TYPE_CHECKING:
    import torch
    from PIL import Image

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_PIXELS = 64 * 2**20  # maximum size of a decoded image; a small file may hold a huge one
REFERENCE_PIXELS = 2**20  # a larger reference is scaled down to as many, as FLUX.2's pipelines do


def read_picture(content: bytes, height: int, width: int) -> "torch.Tensor":
    """Decode an image file into uint8, height x width x 3.

    The file is read as in training (upright, sRGB, also 16 bits and CMYK, transparent parts white), cropped
    centrally to that aspect ratio, then scaled with bicubic interpolation and antialiasing. An image of that
    size stays unchanged.

    Raises:
        APIError: 400, the file is not a readable image in one of `FORMATS`, or has too many pixels.
    """
    import torch
    from numpy import array
    from PIL import Image, ImageOps

    picture = _decoded(content)
    # Only the crop is scaled: one pixel of a line that is one pixel high.
    return torch.from_numpy(array(ImageOps.fit(picture, (width, height), Image.Resampling.BICUBIC)))


def read_references(contents: Sequence[bytes], multiple: int, max_side: int) -> "tuple[torch.Tensor, ...]":
    """Decode image files into references: each uint8, height x width x 3.

    They are read as by `read_picture`, scaled down where they have more than `REFERENCE_PIXELS` pixels or a
    side of more than `max_side`, and cropped centrally to sides that are multiples of `multiple`.

    Raises:
        APIError: 400, as by `read_picture`, or a side is too short; names the file's number.
    """
    several = len(contents) > 1
    return tuple(
        _reference(content, f"picture {number}: " if several else "", multiple, max_side)
        for number, content in enumerate(contents, start=1)
    )


def _reference(content: bytes, which: str, multiple: int, max_side: int) -> "torch.Tensor":
    import torch
    from numpy import array
    from PIL import Image

    picture = _decoded(content, which)
    area = picture.width * picture.height
    scale = min(1.0, (REFERENCE_PIXELS / area) ** 0.5, max_side / max(picture.size))
    # A side that is a whole number may come out a little less.
    width, height = (int(side * scale + 1e-6) for side in picture.size)
    if min(width, height) < multiple:
        size = f"{picture.width}x{picture.height} pixels"
        raise _invalid(f"{which}{size}; its shorter side must be at least {multiple}, also once scaled down")
    if (width, height) != picture.size:
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    left, top = width % multiple // 2, height % multiple // 2
    box = left, top, left + width // multiple * multiple, top + height // multiple * multiple
    return torch.from_numpy(array(picture.crop(box)))


def _decoded(content: bytes, which: str = "") -> "Image.Image":
    """Decode an untrusted file; `which` says in errors which one."""
    try:
        return reading.read_picture(content, background="white", max_pixels=MAX_PIXELS, formats=FORMATS).image
    except reading.Rejected as rejected:
        if rejected.reason == "too_many_pixels":
            raise _invalid(which + rejected.detail) from rejected
        raise _invalid(f"{which}not a picture in one of {', '.join(FORMATS)}") from rejected


def _invalid(reason: str) -> APIError:
    return APIError(400, f"image: {reason}", "image", "invalid_value")
