"""Pictures that clients send, made into what the engine takes. Nothing of them is trusted."""

from typing import TYPE_CHECKING

from ray_jobs.pictures import reading
from serving.schemas import APIError

if TYPE_CHECKING:
    import torch

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_PIXELS = 64 * 2**20  # of a picture that is opened; a small file may hold a huge one


def read_picture(content: bytes, height: int, width: int) -> "torch.Tensor":
    """Return a picture file as uint8, height x width x 3.

    It is read as training reads its pictures (upright, sRGB, 16 bits and CMYK too, transparent parts white),
    cut off evenly to that shape, then scaled with bicubic interpolation and antialiasing. One that fits stays
    as it is.

    Raises:
        APIError: 400, it is no such file.
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
    # Only what is left after the cut is scaled: of a line a pixel high, a pixel.
    return torch.from_numpy(array(ImageOps.fit(picture, (width, height), Image.Resampling.BICUBIC)))


def _invalid(reason: str) -> APIError:
    return APIError(400, f"image: {reason}", "image", "invalid_value")
