"""Pictures saved for a rung, stored with its checkpoint."""

import hashlib
import io
import math
from collections.abc import Sequence

from PIL import Image

from cluster.storage import Storage, slug

SAMPLES = "samples"  # subfolder of the checkpoint
PROMPTS = "prompts"  # the same, with pictures of the user's own prompts
SHEET_PICTURE = 128  # maximum side of a picture on a sheet, in pixels
SHEET_PICTURES = 64  # maximum pictures per sheet


def sample_name(number: int, caption: str) -> str:
    """File name of a saved picture."""
    return f"{number}-{slug(caption)}.png"


def prompt_name(number: int, prompt: str) -> str:
    """File name of a picture of an own prompt; with a digest, since others may shorten to the same slug."""
    digest = hashlib.sha256(prompt.encode()).hexdigest()[:8]
    return f"{number}-{slug(prompt)}-{digest}.png"


def sheet(folder: Storage) -> Image.Image | None:
    """Tile a folder's first pictures into one, row by row in caption order; None if there are none."""
    numbered = sorted(folder.files(), key=lambda name: int(name.partition("-")[0]))[:SHEET_PICTURES]
    return _tiled([_opened(folder.read_bytes(name)) for name in numbered]) if numbered else None


def _opened(png: bytes) -> Image.Image:
    picture = Image.open(io.BytesIO(png)).convert("RGB")
    picture.thumbnail((SHEET_PICTURE, SHEET_PICTURE))
    return picture


def _tiled(pictures: Sequence[Image.Image]) -> Image.Image:
    columns = math.ceil(len(pictures) ** 0.5)
    width, height = (max(picture.size[axis] for picture in pictures) for axis in (0, 1))
    tiled = Image.new("RGB", (columns * width, math.ceil(len(pictures) / columns) * height), "white")
    for number, picture in enumerate(pictures):
        line, column = divmod(number, columns)
        tiled.paste(picture, (column * width, line * height))
    return tiled
