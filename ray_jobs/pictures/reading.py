"""Decode image files to upright 8-bit sRGB pixels."""

import functools
import io
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from ray_jobs.pictures.colours import eight_bits, to_srgb
from ray_jobs.pictures.png import pixels_only

# How a file of each format begins. Only the matching parser is used: Pillow has about forty, and an untrusted
# file should not choose among them (EPS would start Ghostscript).
SIGNATURES = {
    "JPEG": re.compile(rb"\xff\xd8\xff"),
    "PNG": re.compile(rb"\x89PNG\r\n\x1a\n"),
    "WEBP": re.compile(rb"RIFF....WEBP", re.DOTALL),
    "GIF": re.compile(rb"GIF8[79]a"),
    "TIFF": re.compile(rb"II[*+]\0|MM\0[*+]"),
    "BMP": re.compile(rb"BM"),
}
# AVIF and HEIF share a container of boxes, whose brands name the formats that it can be read as.
BRANDS = {
    "AVIF": {b"avif", b"avis"},
    "HEIF": {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"},
}
FORMATS = (*SIGNATURES, *BRANDS)
BRANDS_END = 256  # bytes at the beginning of a file that are searched for brands
PREVIEW = 1  # bit of TIFF's NewSubfileType
DNG_VERSION = 50706  # tag of a raw image in a TIFF
MAX_PIXELS = 100_000_000
WHITE = 128  # of 255: pixels of a mask that are as bright count as white

# Pillow warns above a process-wide limit on pixels, and raises above twice that. Setting it per image would
# race between threads, so it is turned off once, and `read_picture` checks the size in the header instead.
Image.MAX_IMAGE_PIXELS = None

# Operation that turns an image upright, by EXIF Orientation (CIPA DC-008, 4.6.5); 1 is upright.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SWAPS_SIDES = (5, 6, 7, 8)


class Rejected(Exception):
    """An image that is rejected. `reason` is counted; `detail` is for people to read."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)  # all arguments, so that the exception can be pickled
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


@dataclass(frozen=True)
class Picture:
    """A decoded image: `image` is RGB and upright, and may be smaller than the one in the file."""

    image: Image.Image
    width: int  # width of the file's image, upright, in pixels
    height: int
    is_transparent: bool = False  # whether some pixels of the file are not opaque


def read_picture(
    data: bytes,
    *,
    background: str,
    max_pixels: int,
    at_least: int | None = None,
    formats: Collection[str] = FORMATS,
) -> Picture:
    """Decode a JPEG, PNG, WebP, GIF, TIFF, BMP, AVIF or HEIF file to an upright 8-bit sRGB image.

    Only the first frame or page is read. Metadata (texts, EXIF, a profile) that is broken or too large is
    ignored.

    Args:
        data: the whole file.
        background: colour that shows through transparent pixels, in Pillow's notation.
        max_pixels: maximum number of pixels; a larger image is rejected before any pixel is decoded.
        at_least: decode a JPEG at 1/2, 1/4 or 1/8 of its size, as long as the shorter side keeps this many
            pixels; this at least halves the time for a large one. None for full size.
        formats: the formats to accept, a subset of FORMATS.

    Raises:
        Rejected: `empty_file`; `unknown_format`; `too_many_pixels`; `truncated`: the file ends too early;
            `unreadable`: it is broken in another way.
    """
    stored = _stored(data, max_pixels, at_least, formats)
    upright, alpha, size = to_srgb(stored.colours, stored.profile), stored.alpha, stored.size
    is_transparent = alpha is not None and alpha.histogram()[-1] < alpha.width * alpha.height
    if alpha is not None:
        canvas = Image.new("RGB", upright.size, background)
        canvas.paste(upright, mask=alpha)
        upright = canvas
    if stored.orientation in UPRIGHT:
        upright = upright.transpose(UPRIGHT[stored.orientation])
    width, height = reversed(size) if stored.orientation in SWAPS_SIDES else size
    return Picture(upright, width, height, is_transparent)


def read_alpha(data: bytes, *, max_pixels: int) -> Image.Image | None:
    """Decode the alpha channel of a PNG file: 8 bits, upright; None if it has none.

    Args:
        data, max_pixels: as for `read_picture`.

    Raises:
        Rejected: as for `read_picture`.
    """
    stored = _stored(data, max_pixels, None, ("PNG",))
    if stored.alpha is None or stored.orientation not in UPRIGHT:
        return stored.alpha
    return stored.alpha.transpose(UPRIGHT[stored.orientation])


class _Stored(NamedTuple):
    """A decoded file, neither upright nor in sRGB."""

    colours: Image.Image
    alpha: Image.Image | None
    profile: bytes | None
    orientation: int
    size: tuple[int, int]  # width and height of the file's image in pixels


def _stored(data: bytes, max_pixels: int, at_least: int | None, formats: Collection[str]) -> _Stored:
    """Decode a file; arguments and errors as of `read_picture`."""
    if not data:
        raise Rejected("empty_file", "the file is empty")
    file_format = _format(data)
    if file_format not in formats:
        raise Rejected("unknown_format", f"not one of {', '.join(formats)}; it begins with {data[:12]!r}")
    profile = None
    if file_format == "PNG":
        data, profile = pixels_only(data)
    try:
        image, size = _load(data, file_format, max_pixels, at_least)
        orientation = _orientation(image)
        profile = profile or image.info.get("icc_profile")
        return _Stored(*eight_bits(image), profile, orientation, size)
    except Rejected:
        raise
    except Exception as error:
        # Pillow's parsers raise all kinds of errors on bad bytes: OSError, SyntaxError and ValueError, but
        # also struct.error, KeyError, OverflowError, MemoryError and more.
        broken = "the header is broken" if isinstance(error, UnidentifiedImageError) else str(error)
        cut = "truncated" in broken.lower() or _is_cut(data, file_format)
        detail = f"{file_format}: {broken or type(error).__name__}"
        raise Rejected("truncated" if cut else "unreadable", detail) from None


def _format(data: bytes) -> str:
    """Return the format of a file by how it begins; "" if it is not supported."""
    if data[4:8] == b"ftyp":
        end = min(int.from_bytes(data[:4], "big"), BRANDS_END)
        brands = {data[8:12], *(data[at : at + 4] for at in range(16, end, 4))}
        return next((name for name, known in BRANDS.items() if brands & known), "")
    return next((name for name, begins in SIGNATURES.items() if begins.match(data)), "")


def _load(
    data: bytes, file_format: str, max_pixels: int, at_least: int | None
) -> tuple[Image.Image, tuple[int, int]]:
    """Return the pixels as stored, and the width and height before any reduction."""
    if file_format == "HEIF":
        _register_heif()
    image = Image.open(io.BytesIO(data), formats=[file_format])
    width, height = _checked_size(image, max_pixels)
    tags = getattr(image, "tag_v2", {})
    if DNG_VERSION in tags or tags.get(ExifTags.Base.NewSubfileType, 0) & PREVIEW:
        raise Rejected("unknown_format", "a camera's raw file, of which only the preview could be read")
    if at_least and file_format == "JPEG":  # for HEIF it would load the thumbnail
        image.draft(None, (at_least, at_least))
        image.load()
        return image, (width, height)
    image.load()
    return image, _checked_size(image, max_pixels)  # a HEIF file's image may differ from its header


def _checked_size(image: Image.Image, max_pixels: int) -> tuple[int, int]:
    width, height = image.size
    if width * height > max_pixels:
        raise Rejected("too_many_pixels", f"{width}x{height} are more pixels than the {max_pixels:,} allowed")
    return width, height


@functools.cache
def _register_heif() -> None:
    import pillow_heif  # takes as long to import as everything else here

    pillow_heif.register_heif_opener()


def _orientation(image: Image.Image) -> int:
    """Return the Orientation of a loaded image (EXIF, else XMP); 1 if it has none or its EXIF is broken.

    For a TIFF, Pillow has already applied and removed it.
    """
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:
        # An image is usable without its EXIF, whose parser raises as many kinds of errors as the others.
        return 1


def _is_cut(data: bytes, file_format: str) -> bool:
    """Return whether a file that could not be read lacks its end marker, or is shorter than it states."""
    match file_format:
        case "JPEG":
            return b"\xff\xd9" not in data
        case "PNG":
            return b"IEND" not in data
        case "GIF":
            return not data.endswith(b";")
        case "WEBP":
            return int.from_bytes(data[4:8], "little") + 8 > len(data)
        case "AVIF" | "HEIF":
            return _boxes_end(data) > len(data)
        case "BMP":
            return int.from_bytes(data[2:6], "little") > len(data)
        case _:  # TIFF: its directory often comes last
            return int.from_bytes(data[4:8], "little" if data[:2] == b"II" else "big") >= len(data)


def _boxes_end(data: bytes) -> int:
    """Return where the last box of an AVIF or HEIF file should end, in bytes from the file's beginning."""
    end = 0
    while end + 16 <= len(data):
        size = int.from_bytes(data[end : end + 4], "big")
        size = int.from_bytes(data[end + 8 : end + 16], "big") if size == 1 else size
        if size < 8:  # 0: to the end of the file
            return len(data)
        end += size
    return end


def decode_image(
    data: bytes, *, resolution: int, background: str, max_pixels: int = MAX_PIXELS
) -> np.ndarray:
    """Read an image as `read_picture` does, resize the short side and crop the centre.

    Returns:
        uint8, resolution x resolution x 3.

    Raises:
        Rejected: the bytes are not a complete image, or it has more than `max_pixels`.
    """
    picture = read_picture(data, background=background, max_pixels=max_pixels)
    return np.asarray(ImageOps.fit(picture.image, (resolution, resolution), Image.Resampling.LANCZOS))


def encode_png(pixels: np.ndarray) -> bytes:
    """Encode uint8 pixels, height x width x 3, or 4 with an alpha channel, as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()
