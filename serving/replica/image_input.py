"""Decode the images that clients send into the engine's input. They are untrusted."""

from typing import TYPE_CHECKING

from ray_jobs.pictures import reading
from serving.schemas import APIError

if TYPE_CHECKING:
    import torch

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_PIXELS = 64 * 2**20  # maximum size of a decoded image; a small file may hold a huge one


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

    try:
        picture = reading.read_picture(
            content, background="white", max_pixels=MAX_PIXELS, formats=FORMATS
        ).image
    except reading.Rejected as rejected:
        if rejected.reason == "too_many_pixels":
            raise _invalid(rejected.detail) from rejected
        raise _invalid(f"not a picture in one of {', '.join(FORMATS)}") from rejected
    # Only the crop is scaled: one pixel of a line that is one pixel high.
    return torch.from_numpy(array(ImageOps.fit(picture, (width, height), Image.Resampling.BICUBIC)))


def _invalid(reason: str) -> APIError:
    return APIError(400, f"image: {reason}", "image", "invalid_value")
