#!/usr/bin/env bash
# A text chunk of a valid PNG decides over its pixels in Pillow, by the name that the text has.
# usage: findings/png_text_names.sh     (needs python3 with pip and venv, and a network; some ten seconds)
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check pillow==13.0.0 pypng==0.20220715.0
"$work/venv/bin/python" - <<'PYTHON'
import io
import sys

import PIL
import png
from PIL import Image, PngImagePlugin

print(f"Pillow {PIL.__version__}, beside pypng {png.__version__}")
print("The guess: what a tEXt chunk holds is in Image.text (and Image.info), and the pixels come out the same.")


def outcome(name: str) -> tuple[str, str, bool]:
    """Convert an opaque red picture with one text of this name, by Pillow and by pypng."""
    texts = PngImagePlugin.PngInfo()
    texts.add_text(name, "a note")
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (200, 10, 10)).save(file, "PNG", pnginfo=texts)
    _, _, rows, _ = png.Reader(bytes=file.getvalue()).asRGB8()
    plain = "red" if all(bytes(row) == bytes([200, 10, 10] * 4) for row in rows) else "other pixels"
    image = Image.open(io.BytesIO(file.getvalue()))
    try:
        found = "red" if image.convert("RGBA").getpixel((0, 0)) == (200, 10, 10, 255) else "other pixels"
    except Exception as error:
        found = f"{type(error).__name__}: {error}"
    return plain, found, Image.open(io.BytesIO(file.getvalue())).has_transparency_data


expected = {
    "Comment": ("red", False),
    "interlace": ("OSError: image file is truncated (0 bytes not processed)", False),
    "transparency": ("TypeError: argument 2 must be sequence of length 3, not 6", True),
}
changed = False
for name, (error, transparent) in expected.items():
    plain, found, has_transparency = outcome(name)
    print(f"a text named {name!r}: pypng: {plain}; Pillow: {found}; has_transparency_data: {has_transparency}")
    changed |= (plain, found, has_transparency) != ("red", error, transparent)
print(
    "The behaviour: the text is written into Image.info under its own name, where the decoder looks for the header's "
    "interlacing and convert() for the colour of tRNS. So a note named 'interlace' makes a whole file 'truncated', and "
    "one named 'transparency' makes an opaque picture transparent and its conversion fail."
)
sys.exit("the behaviour has changed" if changed else 0)
PYTHON
