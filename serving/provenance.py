"""Provenance stored in an image file: the model that generated it, and the parameters.

Two text chunks of a PNG (W3C, Portable Network Graphics, section 11.3.3): `diffray`, JSON for programs, and
`parameters`, the text that image tools show and read. Anyone may change them: they are a label, not a proof.

zlib's level 1 takes less of a replica's core: on a busy one 61 ms for `docs/demo.png` instead of 148 at the
default level 6, and 242 instead of 509 for a smooth picture of 1024 x 1024 with noise, for 18 and 12 % more
bytes.
"""

import io
import json
import struct
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

CHUNK = "diffray"
TOOLS_CHUNK = "parameters"
SIGNATURE = b"\x89PNG\r\n\x1a\n"
MAX_FACTS = 1 << 18  # maximum bytes of JSON that are read
DESCRIPTION, DETAILS, COMMENT = 0x010E, 0x8769, 0x9286  # EXIF: ImageDescription, its Exif IFD, UserComment
MAX_EXIF = 2**16 - 2 - len("Exif\0\0")  # bytes in a JPEG's segment
MAX_CHUNKS = 64  # maximum chunks read before the pixels; ours are among the first


def facts_of(
    parameters: Mapping[str, object],
    *,
    base: str,
    adapter_digest: str | None = None,
    with_prompt: bool = True,
) -> dict[str, object]:
    """Return the provenance of a served image.

    It never identifies the requester, neither the user nor the key.

    Args:
        parameters: values by the names of `feedback.schemas.Generation`; those that determine the image are
            taken.
        base: name of the model that was fine-tuned.
        adapter_digest: SHA-256 of the adapter's weights.
        with_prompt: include the prompts.
    """
    wanted = ["image_id", "model", "version", "adapter", "adapters", "seed", "steps", "guidance_scale"]
    wanted += ["size", "strength", "num_references", "control_scale", "guidance_interval"]
    wanted += ["prompt", "negative_prompt"] if with_prompt else []
    facts = {name: parameters.get(name) for name in wanted}
    facts |= {"base": base, "adapter_digest": adapter_digest}
    return {name: value for name, value in facts.items() if value is not None}


def encode_png(pixels: np.ndarray, facts: Mapping[str, object] | None) -> bytes:
    """Encode an image as a PNG file.

    Args:
        pixels: uint8, height x width x 3.
        facts: provenance from `facts_of`, JSON values; None: only the pixels are written.

    Raises:
        ValueError: the facts are larger than `read_provenance` would read.
    """
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    chunks = PngInfo()
    if facts is not None:
        text = json.dumps(facts, allow_nan=False)  # ASCII for any prompt: legal in every chunk
        if len(text) > MAX_FACTS:
            raise ValueError(
                f"facts: {len(text)} bytes; at most {MAX_FACTS} are read back: shorten the prompt"
            )
        chunks.add_text(CHUNK, text)
        chunks.add_itxt(TOOLS_CHUNK, parameters_line(facts))
    file = io.BytesIO()
    # For a large image the default level takes several times as long as the rest of an answer.
    Image.fromarray(pixels).save(file, format="PNG", pnginfo=chunks, compress_level=1)
    return file.getvalue()


def exif_of(facts: Mapping[str, object]) -> bytes:
    """Return EXIF for a JPEG or WebP file: the facts as JSON in ImageDescription, the line for image tools in
    UserComment. Prompts that do not fit into the 64 KiB that a JPEG has for it are left out."""
    from PIL import Image

    for kept in (facts, {name: value for name, value in facts.items() if "prompt" not in name}):
        exif = Image.Exif()
        exif[DESCRIPTION] = json.dumps(kept, allow_nan=False)
        exif.get_ifd(DETAILS)[COMMENT] = b"UNICODE\0" + parameters_line(kept).encode("utf-16-be")
        if len(content := exif.tobytes()) <= MAX_EXIF:
            break
    return content


def parameters_line(facts: Mapping[str, object]) -> str:
    """Format facts as image tools do: the prompt, the negative prompt, and one line of settings."""
    labels = {
        "steps": "Steps",
        "guidance_scale": "CFG scale",
        "seed": "Seed",
        "size": "Size",
        "base": "Base model",
        "model": "Model",
        "version": "Model version",
        "adapter": "Adapter",
        "adapters": "Adapters",
    }
    shown = {**facts}
    if isinstance(adapters := facts.get("adapters"), list):
        shown["adapters"] = " + ".join(f"{each['name']} x {each['scale']}" for each in adapters)
    settings = ", ".join(f"{label}: {shown[name]}" for name, label in labels.items() if name in shown)
    lines = [
        str(facts.get("prompt") or ""),
        f"Negative prompt: {facts['negative_prompt']}" if facts.get("negative_prompt") else "",
    ]
    text = "\n".join([line for line in lines if line] + [settings])
    # A null character ends a chunk's text, and lone surrogates are invalid in UTF-8.
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}").encode("utf-8", "replace").decode("utf-8")


def read_provenance(file: bytes) -> dict[str, Any] | None:
    """Read the facts in a served PNG, JPEG or WebP; return None if they are missing or damaged.

    Safe for untrusted files: no pixels are decoded, of a PNG nothing is decompressed, and at most `MAX_FACTS`
    bytes of JSON are read.
    """
    text = _text_in_png(file) if file.startswith(SIGNATURE) else _text_in_exif(file)
    try:
        facts = json.loads(text) if text and len(text) <= MAX_FACTS else None
    # RecursionError: JSON nested thousands of levels deep.
    except (ValueError, RecursionError):
        return None
    return facts if isinstance(facts, dict) else None


def _text_in_png(png: bytes) -> str | None:
    for kind, data in _chunks(png):
        keyword, _, text = data.partition(b"\0")
        if kind == b"tEXt" and keyword == CHUNK.encode():
            return text.decode("ascii", "replace")
    return None


def _text_in_exif(file: bytes) -> str | None:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(file), formats=("JPEG", "WEBP")) as image:
            text = image.getexif().get(DESCRIPTION)
    except (OSError, SyntaxError, ValueError):  # what Pillow raises for damaged and other files
        return None
    return text if isinstance(text, str) else None


def _chunks(png: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield type and data of the small chunks before the pixels; stop at a damaged one."""
    if not png.startswith(SIGNATURE):
        return
    position = len(SIGNATURE)
    for _ in range(MAX_CHUNKS):
        head = png[position : position + 8]
        if len(head) < 8 or head[4:] in (b"IDAT", b"IEND"):
            return
        (length,) = struct.unpack(">I", head[:4])
        end = position + 8 + length
        if end + 4 > len(png):
            return
        if length <= MAX_FACTS + len(CHUNK) + 1:
            data = png[position + 8 : end]
            if zlib.crc32(head[4:] + data) != int.from_bytes(png[end : end + 4], "big"):
                return
            yield head[4:], data
        position = end + 4
