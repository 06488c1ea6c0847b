"""Provenance in a picture's own file: which model drew it, and from what.

Two text chunks of a PNG (W3C, Portable Network Graphics, section 11.3.3): `diffray`, JSON for programs, and
`parameters`, the line that picture tools show and read. Whoever has a picture may have changed them: they are
a label, not a proof.
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
MAX_FACTS = 1 << 18  # bytes of JSON; more is not read
MAX_CHUNKS = 64  # before the pixels; ours are among the first


def facts_of(
    parameters: Mapping[str, Any], *, base: str, adapter_digest: str | None = None, with_prompt: bool = True
) -> dict[str, Any]:
    """What a served picture says of itself.

    Never who asked: not the user, nor the key.

    Args:
        parameters: by the names of `feedback.schemas.Generation`; those that draw the picture are taken.
        base: name of the model that was fine-tuned.
        adapter_digest: sha256 of the adapter's weights.
        with_prompt: False leaves out what the prompts were.
    """
    wanted = ["image_id", "model", "version", "adapter", "seed", "steps", "guidance_scale", "size"]
    wanted += ["strength", *(["prompt", "negative_prompt"] if with_prompt else [])]
    facts = {name: parameters.get(name) for name in wanted}
    facts |= {"base": base, "adapter_digest": adapter_digest}
    return {name: value for name, value in facts.items() if value is not None}


def encode_png(pixels: np.ndarray, facts: Mapping[str, Any] | None) -> bytes:
    """A PNG file.

    Args:
        pixels: uint8, height x width x 3.
        facts: from `facts_of`, values of JSON; None writes nothing but the pixels.

    Raises:
        ValueError: if the facts are more than `read_provenance` would read.
    """
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    chunks = PngInfo()
    if facts is not None:
        text = json.dumps(facts, allow_nan=False)  # of ASCII only, whatever the prompt: legal in every chunk
        if len(text) > MAX_FACTS:
            raise ValueError(
                f"facts: {len(text)} bytes; at most {MAX_FACTS} are read back: shorten the prompt"
            )
        chunks.add_text(CHUNK, text)
        chunks.add_itxt(TOOLS_CHUNK, parameters_line(facts))
    file = io.BytesIO()
    # Of a large picture the usual level takes several times as long as all the rest of an answer.
    Image.fromarray(pixels).save(file, format="PNG", pnginfo=chunks, compress_level=1)
    return file.getvalue()


def parameters_line(facts: Mapping[str, Any]) -> str:
    """The form that picture tools agree on: the prompt, what it is not to be, and one line of settings."""
    labels = {
        "steps": "Steps",
        "guidance_scale": "CFG scale",
        "seed": "Seed",
        "size": "Size",
        "base": "Base model",
        "model": "Model",
        "version": "Model version",
        "adapter": "Adapter",
    }
    settings = ", ".join(f"{label}: {facts[name]}" for name, label in labels.items() if name in facts)
    lines = [
        facts.get("prompt"),
        facts.get("negative_prompt") and f"Negative prompt: {facts['negative_prompt']}",
    ]
    text = "\n".join([line for line in lines if line] + [settings])
    # A zero ends a chunk's text, and lone surrogates are no UTF-8.
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}").encode("utf-8", "replace").decode("utf-8")


def read_provenance(png: bytes) -> dict[str, Any] | None:
    """The facts that `encode_png` wrote; None where there are none that are whole.

    For files of any origin: nothing is decompressed or decoded, and no more than `MAX_FACTS` bytes are read.
    """
    for kind, data in _chunks(png):
        keyword, _, text = data.partition(b"\0")
        if kind == b"tEXt" and keyword == CHUNK.encode() and len(text) <= MAX_FACTS:
            try:
                facts = json.loads(text.decode("ascii"))
            # RecursionError: brackets in brackets, ten thousand deep.
            except (ValueError, RecursionError):
                return None
            return facts if isinstance(facts, dict) else None
    return None


def _chunks(png: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Kind and data of the small chunks before the pixels, until one is damaged."""
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
