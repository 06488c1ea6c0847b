"""From the bytes of a picture file to upright 8-bit sRGB pixels."""

import functools
import io
import re
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from ray_jobs.pictures.colours import eight_bits, to_srgb
from ray_jobs.pictures.png import pixels_only

# By how a file of each format begins. Only the one that fits is opened: Pillow knows some forty formats,
# and a file of a stranger should not choose among their parsers (EPS would start Ghostscript).
SIGNATURES = {
    "JPEG": re.compile(rb"\xff\xd8\xff"),
    "PNG": re.compile(rb"\x89PNG\r\n\x1a\n"),
    "WEBP": re.compile(rb"RIFF....WEBP", re.DOTALL),
    "GIF": re.compile(rb"GIF8[79]a"),
    "TIFF": re.compile(rb"II[*+]\0|MM\0[*+]"),
    "BMP": re.compile(rb"BM"),
}
# AVIF and HEIF are boxes of one container, which names what it can be read as.
BRANDS = {
    "AVIF": {b"avif", b"avis"},
    "HEIF": {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"},
}
FORMATS = (*SIGNATURES, *BRANDS)
BRANDS_END = 256  # bytes of a file in which its brands are looked for
PREVIEW = 1  # bit of TIFF's NewSubfileType
DNG_VERSION = 50706  # tag of a raw picture in a TIFF
MAX_PIXELS = 100_000_000

# Pillow warns of, and at twice that refuses, what is larger than a bound of the whole process. Setting it
# for each picture would race between threads, so it is off, once; `read_picture` asks the header instead.
Image.MAX_IMAGE_PIXELS = None

# What Orientation of EXIF asks for to turn a picture upright (CIPA DC-008, 4.6.5); 1 is upright.
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
    """A picture that is set aside. `reason` is counted, `detail` is for a person."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)  # all arguments, so that it can be pickled
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


@dataclass(frozen=True)
class Picture:
    """A decoded picture: `image` is RGB and upright, and may be smaller than the file's picture."""

    image: Image.Image
    width: int  # of the file's picture, upright, in pixels
    height: int


def read_picture(
    data: bytes,
    *,
    background: str,
    max_pixels: int,
    at_least: int | None = None,
    formats: Collection[str] = FORMATS,
) -> Picture:
    """Decode a JPEG, PNG, WebP, GIF, TIFF, BMP, AVIF or HEIF file, turn it upright, make it 8-bit sRGB.

    Of several frames or pages the first one counts. What stands beside the pixels (texts, EXIF or a profile
    that are broken or too large) is left aside.

    Args:
        data: the whole file.
        background: colour that shows through transparent pixels, as Pillow names colours.
        max_pixels: a larger picture is rejected before any pixel is decoded.
        at_least: decode a JPEG at 1/2, 1/4 or 1/8 of its size, as long as the shorter side keeps so many
            pixels; the time for a large one falls by half and more. None: full size.
        formats: those of FORMATS that are read.

    Raises:
        Rejected: `empty_file`; `unknown_format`; `too_many_pixels`; `truncated`: the file ends too early;
            `unreadable`: it is broken in another way.
    """
    if not data:
        raise Rejected("empty_file", "the file has no bytes")
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
        colours, alpha = eight_bits(image)
    except Rejected:
        raise
    except Exception as error:
        # Pillow's parsers let through whatever they trip over in bad bytes: OSError, SyntaxError and
        # ValueError, but struct.error, KeyError, OverflowError, MemoryError and more as well.
        broken = "the header is broken" if isinstance(error, UnidentifiedImageError) else str(error)
        cut = "truncated" in broken.lower() or _is_cut(data, file_format)
        detail = f"{file_format}: {broken or type(error).__name__}"
        raise Rejected("truncated" if cut else "unreadable", detail) from None
    upright = to_srgb(colours, profile)
    if alpha is not None:
        canvas = Image.new("RGB", upright.size, background)
        canvas.paste(upright, mask=alpha)
        upright = canvas
    if orientation in UPRIGHT:
        upright = upright.transpose(UPRIGHT[orientation])
    return Picture(upright, *(reversed(size) if orientation in SWAPS_SIDES else size))


def _format(data: bytes) -> str:
    """The format of a file by how it begins; "" if it is none that is read."""
    if data[4:8] == b"ftyp":
        end = min(int.from_bytes(data[:4], "big"), BRANDS_END)
        brands = {data[8:12], *(data[at : at + 4] for at in range(16, end, 4))}
        return next((name for name, known in BRANDS.items() if brands & known), "")
    return next((name for name, begins in SIGNATURES.items() if begins.match(data)), "")


def _load(
    data: bytes, file_format: str, max_pixels: int, at_least: int | None
) -> tuple[Image.Image, tuple[int, int]]:
    """The pixels as they are stored, and the width and height before any reduction."""
    if file_format == "HEIF":
        _register_heif()
    image = Image.open(io.BytesIO(data), formats=[file_format])
    width, height = _checked_size(image, max_pixels)
    tags = getattr(image, "tag_v2", {})
    if DNG_VERSION in tags or tags.get(ExifTags.Base.NewSubfileType, 0) & PREVIEW:
        raise Rejected("unknown_format", "a camera's raw file, of which only the preview could be read")
    if at_least and file_format == "JPEG":  # of a HEIF file it would take the thumbnail
        image.draft(None, (at_least, at_least))
        image.load()
        return image, (width, height)
    image.load()
    return image, _checked_size(image, max_pixels)  # what a HEIF file holds may differ from its header


def _checked_size(image: Image.Image, max_pixels: int) -> tuple[int, int]:
    width, height = image.size
    if width * height > max_pixels:
        raise Rejected("too_many_pixels", f"{width}x{height} are more pixels than the {max_pixels:,} allowed")
    return width, height


@functools.cache
def _register_heif() -> None:
    import pillow_heif  # it takes as long to import as all else here

    pillow_heif.register_heif_opener()


def _orientation(image: Image.Image) -> int:
    """The Orientation of a loaded picture (EXIF, else XMP); 1 where it has none, or EXIF is broken.

    Pillow has turned a TIFF itself and forgotten the value.
    """
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:
        # A picture is good without its EXIF, and its parser raises as many kinds as the others.
        return 1


def _is_cut(data: bytes, file_format: str) -> bool:
    """Whether a file that could not be read misses its end, or what its header says is there."""
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
    """Where the last box of an AVIF or HEIF file should end, in bytes from its beginning."""
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
    """Read a picture as `read_picture` does, resize the short side and crop the centre.

    Returns:
        uint8, resolution x resolution x 3.

    Raises:
        Rejected: the bytes are no complete picture, or it has more than `max_pixels`.
    """
    picture = read_picture(data, background=background, max_pixels=max_pixels)
    return np.asarray(ImageOps.fit(picture.image, (resolution, resolution), Image.Resampling.LANCZOS))


def encode_png(pixels: np.ndarray) -> bytes:
    """uint8 pixels, height x width x 3, as the bytes of a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()
