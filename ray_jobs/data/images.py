"""From the bytes of a picture file to upright 8-bit sRGB pixels."""

import functools
import io
import re
from dataclasses import dataclass

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageOps, UnidentifiedImageError

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


def read_picture(data: bytes, *, background: str, max_pixels: int, at_least: int | None = None) -> Picture:
    """Decode a JPEG, PNG, WebP, GIF (first frame), TIFF or BMP file, turn it upright, make it 8-bit sRGB.

    Args:
        data: the whole file.
        background: colour that shows through transparent pixels, as Pillow names colours.
        max_pixels: a larger picture is rejected before any pixel is decoded.
        at_least: decode a JPEG at 1/2, 1/4 or 1/8 of its size, as long as the shorter side keeps so many
            pixels; the time for a large one falls by half and more. None: full size.

    Raises:
        Rejected: `empty_file`; `unknown_format`; `too_many_pixels`; `truncated`: the file ends too early;
            `unreadable`: it is broken in another way.
    """
    if not data:
        raise Rejected("empty_file", "the file has no bytes")
    file_format = next((name for name, begins in SIGNATURES.items() if begins.match(data)), None)
    if file_format is None:
        raise Rejected("unknown_format", f"not one of {', '.join(SIGNATURES)}; it begins with {data[:8]!r}")
    try:
        image, size = _load(data, file_format, max_pixels, at_least)
        orientation = _orientation(image)
        profile = image.info.get("icc_profile")
        colours, alpha = _eight_bits(image)
    except Rejected:
        raise
    except Exception as error:
        # Pillow's parsers let through whatever they trip over in bad bytes: OSError, SyntaxError and
        # ValueError, but struct.error, KeyError, OverflowError, MemoryError and more as well.
        broken = "the header is broken" if isinstance(error, UnidentifiedImageError) else str(error)
        cut = "truncated" in broken.lower() or _is_cut(data, file_format)
        detail = f"{file_format}: {broken or type(error).__name__}"
        raise Rejected("truncated" if cut else "unreadable", detail) from None
    upright = _to_srgb(colours, profile)
    if alpha is not None:
        canvas = Image.new("RGB", upright.size, background)
        canvas.paste(upright, mask=alpha)
        upright = canvas
    if orientation in UPRIGHT:
        upright = upright.transpose(UPRIGHT[orientation])
    return Picture(upright, *(reversed(size) if orientation in SWAPS_SIDES else size))


def _load(
    data: bytes, file_format: str, max_pixels: int, at_least: int | None
) -> tuple[Image.Image, tuple[int, int]]:
    """The pixels as they are stored, and the width and height before any reduction."""
    image = Image.open(io.BytesIO(data), formats=[file_format])
    width, height = image.size
    if width * height > max_pixels:
        detail = f"{width} x {height} pixels are more than data.cleaning.max_pixels {max_pixels}"
        raise Rejected("too_many_pixels", detail)
    if at_least:
        image.draft(None, (at_least, at_least))  # what is not JPEG ignores it
    image.load()
    return image, (width, height)


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
        case "BMP":
            return int.from_bytes(data[2:6], "little") > len(data)
        case _:  # TIFF: its directory often comes last
            return int.from_bytes(data[4:8], "little" if data[:2] == b"II" else "big") >= len(data)


def _eight_bits(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """The colours in mode L, RGB or CMYK, and the opacity in mode L (None: opaque)."""
    if image.mode.startswith("I") or image.mode == "F":
        return _grey_from_deep(image), None
    if image.has_transparency_data:
        if image.mode == "La":
            image = image.convert("LA")  # the only way out of premultiplied grey
        mode = "LA" if image.mode in ("L", "LA") else "RGBA"
        with_alpha = image.convert(mode)
        return with_alpha.convert(mode[:-1]), with_alpha.getchannel("A")
    return image if image.mode in ("L", "RGB", "CMYK") else image.convert("RGB"), None


def _grey_from_deep(image: Image.Image) -> Image.Image:
    """Scale 16-bit, 32-bit and float grey to 0..255; Pillow's own conversion would clip it at 255.

    White is 65535 for 16 bits. Integers of 32 bits and floats do not say: of the usual whites, the
    smallest that no value exceeds, or else the brightest value. What is below zero or not finite is black.
    """
    values = np.asarray(image).astype(np.float32)
    np.nan_to_num(values, copy=False, nan=0, posinf=0, neginf=0)
    whites = (65535,) if image.mode.startswith("I;16") else (1, 255, 65535)
    brightest = float(values.max())
    white = next((white for white in whites if brightest <= white), brightest)
    grey = np.rint(np.clip(values / white, 0, 1) * 255).astype(np.uint8)
    tags = getattr(image, "tag_v2", {})
    if tags.get(ExifTags.Base.PhotometricInterpretation) == 0:
        grey = 255 - grey  # "white is zero": Pillow heeds it for 8 bits only
    return Image.fromarray(grey)


def _to_srgb(image: Image.Image, profile: object) -> Image.Image:
    """L, RGB or CMYK to sRGB, by the profile that the file carries, else as Pillow takes the numbers."""
    # A broken TIFF may hold numbers in the place of a profile.
    transform = _transform(profile, image.mode) if isinstance(profile, bytes) else None
    return transform.apply(image) if transform else image.convert("RGB")


@functools.lru_cache(maxsize=16)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From an ICC profile to sRGB; None where there is nothing to do.

    That is so for sRGB itself, which would cost as much as decoding, and for a profile that is broken or
    of another colour space than the picture: the picture is good without it, as browsers hold too.
    """
    try:
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if mode == "RGB" and "sRGB" in ImageCms.getProfileDescription(opened):
            return None
        return ImageCms.buildTransform(opened, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError):
        return None


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
