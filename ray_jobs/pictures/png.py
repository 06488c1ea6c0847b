"""A PNG file without what only stands beside its pixels.

Pillow (13.0) refuses a file with a compressed text or colour profile above 1 MiB (workflows of generators,
profiles of printers), or with a wrong checksum beside the pixels; and a text named `transparency` or
`icc_profile` takes the place of what it is named after. So Pillow is given only the chunks that the pixels
need, and those that turn them upright; the profile is read here, up to a bound.
"""

import zlib
from collections.abc import Iterator

SIGNATURE = b"\x89PNG\r\n\x1a\n"
MAX_PROFILE = 8 << 20  # bytes, as it comes out
MAX_TEXT = 1 << 20  # bytes of a text that is kept, as it comes out: Pillow takes no more
OF_PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
# Texts that can hold the EXIF or XMP that turns a picture upright.
ORIENTING_TEXTS = (b"XML:com.adobe.xmp", b"Raw profile type exif")


def pixels_only(data: bytes) -> tuple[bytes, bytes | None]:
    """A PNG file with only what its upright pixels need, and its colour profile (None: none that is whole).

    Args:
        data: begins with SIGNATURE. A file that is cut, or broken in its order, stays so.
    """
    view = memoryview(data)
    kept, profile, dropped, end = [view[: len(SIGNATURE)]], None, False, len(SIGNATURE)
    for kind, start, end in _chunks(data):
        chunk = view[start:end]
        if kind in OF_PIXELS or _orients(kind, chunk):
            kept.append(chunk)
            continue
        dropped = True
        if kind == b"iCCP" and profile is None and _is_whole(chunk):
            profile = _profile(bytes(chunk[8:-4]))
    if not dropped:
        return data, None
    return b"".join([*kept, view[end:]]), profile


def _chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Kind, start and end of each whole chunk: length, kind, content and checksum."""
    start = len(SIGNATURE)
    while start + 12 <= len(data):
        end = start + 12 + int.from_bytes(data[start : start + 4], "big")
        if end > len(data):
            return
        kind = data[start + 4 : start + 8]
        yield kind, start, end
        if kind == b"IEND":
            return
        start = end


def _is_whole(chunk: memoryview) -> bool:
    return zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:], "big")


def _orients(kind: bytes, chunk: memoryview) -> bool:
    """Whether a chunk can turn the picture upright, and Pillow can read it."""
    if kind == b"eXIf":
        return _is_whole(chunk)
    if kind not in (b"tEXt", b"zTXt", b"iTXt") or not bytes(chunk[8:40]).startswith(ORIENTING_TEXTS):
        return False
    keyword, _, rest = bytes(chunk[8:-4]).partition(b"\0")
    if keyword not in ORIENTING_TEXTS or not _is_whole(chunk):
        return False
    if kind == b"tEXt" or (kind == b"iTXt" and rest[:1] != b"\1"):
        return True  # one that is not compressed needs no bound
    # Of zTXt a method and the text; of iTXt a flag, a method, language, translated keyword and text.
    text = rest[1:] if kind == b"zTXt" else rest[2:].split(b"\0", 2)[-1]
    return _inflated(text, MAX_TEXT) is not None


def _profile(content: bytes) -> bytes | None:
    """The colour profile in an iCCP chunk: name, zero byte, method (0), compressed profile."""
    _, _, rest = content.partition(b"\0")
    return _inflated(rest[1:], MAX_PROFILE) if rest[:1] == b"\0" else None


def _inflated(data: bytes, limit: int) -> bytes | None:
    """What zlib makes of `data`; None where that is broken, or has `limit` bytes or more."""
    try:
        found = zlib.decompressobj().decompress(data, limit)
    except zlib.error:
        return None
    return found if len(found) < limit else None
