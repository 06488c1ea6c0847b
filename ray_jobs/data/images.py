"""From the bytes of a picture file to upright RGB pixels of the training size."""

import io

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError


class Rejected(Exception):
    """A picture that is set aside. `reason` is counted, `detail` is for a person."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


def decode_image(data: bytes, *, resolution: int, background: str) -> np.ndarray:
    """Decode, turn upright, lay over `background`, resize the short side and crop the centre.

    Returns:
        uint8, resolution x resolution x 3.

    Raises:
        Rejected: the bytes are no complete picture.
    """
    if not data:
        raise Rejected("empty_file", "the file has no bytes")
    try:
        with Image.open(io.BytesIO(data)) as opened:
            opened.load()
            image = ImageOps.exif_transpose(opened)
    except UnidentifiedImageError:
        raise Rejected("unreadable", "not a picture in a known format") from None
    except Image.DecompressionBombError as error:
        raise Rejected("too_many_pixels", str(error)) from None
    except (OSError, SyntaxError, ValueError) as error:
        raise Rejected("unreadable", str(error)) from None
    if image.has_transparency_data:
        canvas = Image.new("RGBA", image.size, background)
        canvas.alpha_composite(image.convert("RGBA"))
        image = canvas
    fitted = ImageOps.fit(image.convert("RGB"), (resolution, resolution), Image.Resampling.LANCZOS)
    return np.asarray(fitted)


def encode_png(pixels: np.ndarray) -> bytes:
    """uint8 pixels, height x width x 3, as the bytes of a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()
