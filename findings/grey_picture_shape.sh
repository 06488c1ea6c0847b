#!/usr/bin/env bash
# Ray Data gives a grey picture another shape where a coloured one happens to lie in the same block.
# usage: findings/grey_picture_shape.sh     (needs python3 with pip and venv, and a network; a minute)
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    "ray[data]==2.60.0" pillow==13.0.0 numpy==2.4.6 pyarrow==25.0.1 pandas==3.1.1
FOLDER="$work/pictures" "$work/venv/bin/python" - <<'PYTHON'
import logging
import os
import sys

import numpy as np
import ray
from PIL import Image

print(f"Ray {ray.__version__}")
print(
    "The guess: read_images gives a grey picture as height x width and a coloured one as height x width x 3, whatever "
    "lies beside it, or refuses to mix them; and the number of blocks changes nothing but speed."
)
HEIGHT, WIDTH = 8, 6
folder = os.environ["FOLDER"]
os.makedirs(folder)
colour = np.arange(HEIGHT * WIDTH * 3, dtype=np.uint8).reshape(HEIGHT, WIDTH, 3)
Image.fromarray(colour[:, :, 0]).save(f"{folder}/grey.png")
Image.fromarray(colour).save(f"{folder}/colour.png")
ray.init(num_cpus=2, log_to_driver=False, logging_level="ERROR", include_dashboard=False)
logging.getLogger("ray.data").setLevel(logging.CRITICAL)
ray.data.DataContext.get_current().enable_progress_bars = False


def shapes(files: list[str], blocks: int) -> dict[str, tuple[int, ...]]:
    """Read pictures in so many blocks; return the shape of each by its name."""
    paths = [f"{folder}/{file}.png" for file in files]
    rows = ray.data.read_images(paths, include_paths=True, override_num_blocks=blocks).take_all()
    return {os.path.basename(row["path"])[:-4]: row["image"].shape for row in rows}


both = ["grey", "colour"]
seen = [shapes(["grey"], 1), shapes(both, 2), shapes(both, 1)]
for found, what in zip(seen, ("alone", "beside a coloured one, two blocks", "the same, one block"), strict=True):
    print(f"the grey picture {what}: {found['grey']}; all: {found}")
alone = (HEIGHT, WIDTH)
expected = [{"grey": alone}, {"grey": alone, "colour": (*alone, 3)}, {"grey": (1, *alone), "colour": (*alone, 3)}]
print(
    "The behaviour: in a block with a coloured picture the grey one gets an axis in front, 1 x height x width, without "
    "a word: tensors of fewer dimensions are brought to those of the others. So what a function of rows is given "
    "depends on how many blocks the same files are read in. (mode='RGB' makes all alike.)"
)
sys.exit("the behaviour has changed" if seen != expected else 0)
PYTHON
