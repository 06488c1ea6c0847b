"""The files that images are sent as: PNG, JPEG or WebP."""

import io
from collections.abc import Mapping
from typing import Literal, NamedTuple

import numpy as np

from serving.provenance import encode_png, exif_of

Format = Literal["png", "jpeg", "webp"]
MEDIA_TYPES: dict[str, str] = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
FINE = 90  # JPEG quality from which colours keep their full resolution


class Output(NamedTuple):
    """The kind of file that an image is sent as.

    Attributes:
        compression: quality of JPEG and WebP, from 0 to 100, which is lossless for WebP.
    """

    format: Format = "png"
    compression: int = 100


def encode(pixels: np.ndarray, facts: Mapping[str, object] | None, output: Output) -> bytes:
    """Encode an image, uint8, height x width x 3.

    Args:
        facts: provenance from `facts_of`; None: only the pixels are written.

    Raises:
        ValueError: the facts are larger than `read_provenance` would read.
    """
    if output.format == "png":
        return encode_png(pixels, facts)
    from PIL import Image

    options: dict[str, object] = {} if facts is None else {"exif": exif_of(facts)}
    if output.format == "jpeg" and output.compression >= FINE:
        options["subsampling"] = "4:4:4"
    if output.format == "webp" and output.compression == 100:
        options["lossless"] = True  # a lossy WebP halves the colours' resolution at every quality
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format=output.format, quality=output.compression, **options)
    return file.getvalue()
