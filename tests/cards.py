"""Running the program that a model's card shows."""

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from PIL import Image

from ray_jobs.diffusion.families.text_processor import picture_processor, text_processor


def program(card: str) -> str:
    """The Python code block of a card."""
    [found] = re.findall(r"^(`{3,})python\n(.*?)^\1$", card, flags=re.DOTALL | re.MULTILINE)
    return str(found[1])


@contextlib.contextmanager
def without_torchvision() -> Iterator[None]:
    """Load processors of Qwen's models for texts, or for texts and pictures, as if torchvision were there.

    It is needed for the pictures of the first and for the videos of the second.
    """
    import transformers

    def texts_only(kind: Any, folder: str, subfolder: str = "", **_: object) -> Any:
        return text_processor(kind, transformers.AutoTokenizer.from_pretrained(folder, subfolder=subfolder))

    def without_videos(kind: Any, folder: str, **_: object) -> Any:
        pictures = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
        return picture_processor(kind, pictures, transformers.AutoTokenizer.from_pretrained(folder))

    with (
        patch.object(transformers.Qwen3VLProcessor, "from_pretrained", classmethod(texts_only)),
        patch.object(transformers.Qwen2VLProcessor, "from_pretrained", classmethod(without_videos)),
    ):
        yield


def levels(file: Path) -> Any:
    """A picture on white, as some pipelines' pictures have an alpha channel: int, height x width x 3."""
    picture = Image.open(file).convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    return np.asarray(Image.alpha_composite(white, picture))[..., :3].astype(int)


def draw(card: str, folder: Path) -> Image.Image:
    """Run the card's program, unchanged, in a new process in `folder`; returns the picture that it saves."""
    (folder / "picture.png").unlink(missing_ok=True)
    offline = os.environ | {"HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", program(card)], cwd=folder, env=offline, check=True, timeout=300)
    picture = Image.open(folder / "picture.png")
    picture.load()
    (folder / "picture.png").unlink()
    return picture
