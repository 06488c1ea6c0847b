"""Decode the images that clients send into the engine's input. They are untrusted."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from ray_jobs.pictures import reading
from serving.schemas import APIError

if TYPE_CHECKING:
    import torch
    from PIL import Image

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_PIXELS = 64 * 2**20  # maximum size of a decoded image; a small file may hold a huge one
REFERENCE_PIXELS = 2**20  # a larger reference is scaled down to as many, as FLUX.2's pipelines do
NOTHING_PAINTED = "no pixel is transparent; make those transparent that are to be painted"


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

    return torch.from_numpy(array(_filled(_decoded(content), height, width)))


class References(NamedTuple):
    """References of a request.

    Attributes:
        pictures: each uint8, height x width x 3.
        size: height and width of an image of the first one's shape, scaled as by `REFERENCE_PIXELS`.
    """

    pictures: "tuple[torch.Tensor, ...]"
    size: tuple[int, int]


def read_references(
    contents: Sequence[bytes], multiple: int, max_side: int, resolution: int | None = None
) -> References:
    """Decode image files into references.

    They are read as by `read_picture`, scaled down where they have too many pixels or a side of more than
    `max_side`, and cropped centrally to sides that are multiples of `multiple`.

    Args:
        resolution: root of the most pixels that they may have; None: that of `REFERENCE_PIXELS`.

    Raises:
        APIError: 400, as by `read_picture`, or a side is too short; names the file's number.
    """
    import torch
    from numpy import array

    pictures, size = list[torch.Tensor](), (0, 0)
    most = resolution**2 if resolution else REFERENCE_PIXELS
    for number, content in enumerate(contents, start=1):
        which = f"picture {number}: " if len(contents) > 1 else ""
        picture = _decoded(content, which)
        if number == 1:
            size = _size(*_scaled(picture, REFERENCE_PIXELS, max_side), multiple)
        pictures.append(torch.from_numpy(array(_fitted(picture, which, multiple, max_side, most))))
    return References(tuple(pictures), size)


def read_control(
    content: bytes, size: tuple[int, int] | None, multiple: int, max_side: int
) -> "torch.Tensor":
    """Decode an image file that a ControlNet is to follow: uint8, height x width x 3.

    Args:
        size: height and width, to which it is fitted as by `read_picture`; None: as by `read_references`.

    Raises:
        APIError: 400, as by these.
    """
    import torch
    from numpy import array

    param = "control_image"
    picture = _decoded(content, param=param)
    return torch.from_numpy(array(_sized(picture, size, multiple, max_side, param)))


def read_masked(
    content: bytes, mask: bytes, size: tuple[int, int] | None, multiple: int, max_side: int
) -> "torch.Tensor":
    """Decode an image file and a mask into a picture to paint into: uint8, height x width x 4.

    Its alpha channel is 0 where the mask, a PNG of the image's size, is transparent, and else 255.

    Args:
        size: height and width, to which both are fitted as by `read_picture`; None: as by `read_references`.

    Raises:
        APIError: 400, as by `read_picture` and `read_references`, or the mask has another size, or nothing of
            it is transparent.
    """
    import torch
    from numpy import array, dstack

    picture = _decoded(content)
    try:
        alpha = reading.read_alpha(mask, max_pixels=MAX_PIXELS)
    except reading.Rejected as rejected:
        raise _invalid(f"not a readable PNG: {rejected.detail}", "mask") from rejected
    if alpha is None:
        raise _invalid(NOTHING_PAINTED, "mask")
    if alpha.size != picture.size:
        sizes = " and the image ".join(f"{each.width}x{each.height}" for each in (alpha, picture))
        raise _invalid(f"{sizes} pixels; send a mask of the image's size", "mask")
    painted = alpha.point([255] + 255 * [0])
    colours, hole = (array(_sized(each, size, multiple, max_side)) for each in (picture, painted))
    if hole.max() < reading.WHITE:
        raise _invalid(NOTHING_PAINTED, "mask")
    return torch.from_numpy(dstack([colours, 255 * (hole < reading.WHITE).astype(hole.dtype)]))


def _sized(
    picture: "Image.Image", size: tuple[int, int] | None, multiple: int, max_side: int, param: str = "image"
) -> "Image.Image":
    """Fit a picture to a height and width, or scale it down and crop it if there are none."""
    if size is None:
        return _fitted(picture, "", multiple, max_side, param=param)
    return _filled(picture, *size)


def _filled(picture: "Image.Image", height: int, width: int) -> "Image.Image":
    """Crop a picture centrally to an aspect ratio and scale it."""
    from PIL import Image, ImageOps

    # Only the crop is scaled: one pixel of a line that is one pixel high.
    return ImageOps.fit(picture, (width, height), Image.Resampling.BICUBIC)


def _fitted(
    picture: "Image.Image",
    which: str,
    multiple: int,
    max_side: int,
    most: int = REFERENCE_PIXELS,
    param: str = "image",
) -> "Image.Image":
    """Scale a picture down to at most `most` pixels and crop it; `which` says in errors which one it is."""
    from PIL import Image

    width, height = _scaled(picture, most, max_side)
    cut_height, cut_width = _size(width, height, multiple)
    if not cut_height or not cut_width:
        size = f"{picture.width}x{picture.height} pixels"
        reason = f"{which}{size}; its shorter side must be at least {multiple}, also once scaled down"
        raise _invalid(reason, param)
    if (width, height) != picture.size:
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    left, top = width % multiple // 2, height % multiple // 2
    return picture.crop((left, top, left + cut_width, top + cut_height))


def _scaled(picture: "Image.Image", most: int, max_side: int) -> tuple[int, int]:
    """Return the width and height of a picture that is scaled down to at most `most` pixels."""
    area = picture.width * picture.height
    scale = min(1.0, (most / area) ** 0.5, max_side / max(picture.size))
    # A side that is a whole number may come out a little less.
    width, height = (int(side * scale + 1e-6) for side in picture.size)
    return width, height


def _size(width: int, height: int, multiple: int) -> tuple[int, int]:
    """Return height and width, cut to multiples."""
    return height // multiple * multiple, width // multiple * multiple


def _decoded(content: bytes, which: str = "", param: str = "image") -> "Image.Image":
    """Decode an untrusted file; `which` says in errors which one."""
    try:
        return reading.read_picture(content, background="white", max_pixels=MAX_PIXELS, formats=FORMATS).image
    except reading.Rejected as rejected:
        if rejected.reason == "too_many_pixels":
            raise _invalid(which + rejected.detail, param) from rejected
        raise _invalid(f"{which}not a picture in one of {', '.join(FORMATS)}", param) from rejected


def _invalid(reason: str, param: str = "image") -> APIError:
    return APIError(400, f"{param}: {reason}", param, "invalid_value")
