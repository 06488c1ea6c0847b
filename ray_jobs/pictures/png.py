"""Strip a PNG file of all chunks that its upright pixels do not need.

Pillow (13.0) rejects a file with a compressed text or colour profile above 1 MiB (generators' workflows,
printers' profiles), or with a wrong checksum in a chunk other than the pixels'. Also, a text named
`transparency` or `icc_profile` replaces the real one. So Pillow receives only the chunks that the pixels and
their orientation need; the profile is read here, up to a size limit.
"""

import zlib
from collections.abc import Iterator

SIGNATURE = b"\x89PNG\r\n\x1a\n"
MAX_PROFILE = 8 << 20  # bytes, decompressed
MAX_TEXT = 1 << 20  # bytes of a text that is kept, decompressed: Pillow's own limit
OF_PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
# Texts that can hold an image's orientation, as EXIF or XMP.
ORIENTING_TEXTS = (b"XML:com.adobe.xmp", b"Raw profile type exif")


def pixels_only(data: bytes) -> tuple[bytes, bytes | None]:
    """Return a PNG file with only the chunks that its upright pixels need, and its colour profile.

    The profile is None if the file has no intact one.

    Args:
        data: a file that begins with SIGNATURE. A truncated file, or one with chunks out of order, stays so.
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
    """Yield kind, start and end of each complete chunk, from its length field to its checksum."""
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
    """Return whether a chunk can state the image's orientation and Pillow can read it."""
    if kind == b"eXIf":
        return _is_whole(chunk)
    if kind not in (b"tEXt", b"zTXt", b"iTXt") or not bytes(chunk[8:40]).startswith(ORIENTING_TEXTS):
        return False
    keyword, _, rest = bytes(chunk[8:-4]).partition(b"\0")
    if keyword not in ORIENTING_TEXTS or not _is_whole(chunk):
        return False
    if kind == b"tEXt" or (kind == b"iTXt" and rest[:1] != b"\1"):
        return True  # an uncompressed text needs no limit
    # zTXt: method and text. iTXt: flag, method, language, translated keyword and text.
    text = rest[1:] if kind == b"zTXt" else rest[2:].split(b"\0", 2)[-1]
    return _inflated(text, MAX_TEXT) is not None


def _profile(content: bytes) -> bytes | None:
    """Return the colour profile in an iCCP chunk: name, zero byte, method (0), compressed profile."""
    _, _, rest = content.partition(b"\0")
    return _inflated(rest[1:], MAX_PROFILE) if rest[:1] == b"\0" else None


def _inflated(data: bytes, limit: int) -> bytes | None:
    """Decompress `data` with zlib; None if it is broken, or the result has `limit` bytes or more."""
    try:
        found = zlib.decompressobj().decompress(data, limit)
    except zlib.error:
        return None
    return found if len(found) < limit else None
