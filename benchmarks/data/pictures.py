"""Generated pictures, the same in every run, and the configurations that prepare them."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from ray_jobs.config import Config, load_config

ROOT = Path(__file__).parents[2]


def photograph(number: int) -> Image.Image:
    """512 x 384 pixels: smooth colour, texture and grain, which make a JPEG as large as a photograph's."""
    draw = np.random.default_rng(number)
    size = (512, 384)
    coarse, fine = (
        np.asarray(_noise(draw, columns, rows).resize(size, Image.Resampling.BICUBIC), np.int16)
        for columns, rows in ((8, 6), (128, 96))
    )
    grain = draw.integers(-6, 7, coarse.shape, np.int16)
    return Image.fromarray(np.clip(coarse + (fine - 128) // 5 + grain, 0, 255).astype(np.uint8))


def smooth(number: int) -> Image.Image:
    """64 x 64 pixels of smooth colour that no other number resembles."""
    return _noise(np.random.default_rng(number), 8, 8).resize((64, 64), Image.Resampling.BICUBIC)


def _noise(draw: np.random.Generator, columns: int, rows: int) -> Image.Image:
    return Image.fromarray(draw.integers(0, 256, (rows, columns, 3), np.uint8))


def write_folder(folder: Path, count: int, draw: Callable[[int], Image.Image]) -> None:
    """`count` JPEG files and their captions, all different, in metadata.jsonl."""
    folder.mkdir()
    with (folder / "metadata.jsonl").open("w", encoding="utf-8") as metadata:
        for number in range(count):
            name = f"{number:06d}.jpg"
            draw(number).save(folder / name, quality=90)
            metadata.write(json.dumps({"file_name": name, "text": f"picture {number} of noise"}) + "\n")


def configured(source: Path, storage: Path, *overrides: str) -> Config:
    """The demo's configuration for other pictures."""
    model = f"model.base={ROOT / 'models' / 'emoji-base'}"
    paths = [f"data.source={source}", f"storage={storage}", model]
    return load_config(ROOT / "configs" / "demo.yaml", [*paths, *overrides])
