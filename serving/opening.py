"""Pictures that clients send, made into what the engine takes. Nothing of them is trusted."""

import io
from typing import TYPE_CHECKING

from serving.schemas import APIError

if TYPE_CHECKING:
    import torch

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_PIXELS = 64 * 2**20  # of a picture that is opened; a small file may hold a huge one


def read_picture(content: bytes, height: int, width: int) -> "torch.Tensor":
    """A file of a picture as uint8, height x width x 3: cut off evenly to that shape, then scaled, with
    bicubic interpolation and antialiasing. One that fits stays as it is.

    Transparent parts become white.

    Raises:
        APIError: 400, it is no such file.
    """
    import torch
    from numpy import asarray
    from PIL import Image, ImageOps

    try:
        file = Image.open(io.BytesIO(content), formats=FORMATS)
        if file.width * file.height > MAX_PIXELS:
            raise _invalid(f"{file.width}x{file.height} are more pixels than the {MAX_PIXELS:,} allowed")
        # A camera's turn is in its metadata, not in its pixels.
        picture: Image.Image = ImageOps.exif_transpose(file)
        picture = picture.convert("RGBA" if picture.has_transparency_data else "RGB")
        # Only what is left after the cut is scaled: of a line a pixel high, a pixel.
        picture = ImageOps.fit(picture, (width, height), Image.Resampling.BICUBIC)
        if picture.mode == "RGBA":
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        pixels = asarray(picture.convert("RGB")).copy()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise _invalid(f"not a picture in one of {', '.join(FORMATS)}") from error
    return torch.from_numpy(pixels)


def _invalid(reason: str) -> APIError:
    return APIError(400, f"image: {reason}", "image", "invalid_value")
