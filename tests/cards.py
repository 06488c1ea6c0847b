"""Running the program that a model's card shows."""

import os
import re
import subprocess
import sys
from pathlib import Path

from PIL import Image


def program(card: str) -> str:
    """The Python code block of a card."""
    [found] = re.findall(r"^(`{3,})python\n(.*?)^\1$", card, flags=re.DOTALL | re.MULTILINE)
    return str(found[1])


def draw(card: str, folder: Path) -> Image.Image:
    """Run the card's program, unchanged, in a new process in `folder`; returns the picture that it saves."""
    (folder / "picture.png").unlink(missing_ok=True)
    offline = os.environ | {"HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", program(card)], cwd=folder, env=offline, check=True, timeout=300)
    picture = Image.open(folder / "picture.png")
    picture.load()
    (folder / "picture.png").unlink()
    return picture
