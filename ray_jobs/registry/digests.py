"""Digests that identify a folder of weights by its tensors, not by the bytes of its files.

safetensors writes a header's metadata in a different order in each process, so the same adapter saved twice
gives two different files (safetensors 0.8).
"""

import hashlib
import json
from collections.abc import Iterable, Iterator

from pyarrow import NativeFile, fs

from cluster.storage import Storage
from ray_jobs.config import ConfigError

BLOCK = 1 << 20  # bytes read at once
MAX_HEADER = 100_000_000  # bytes; safetensors' own limit


def weights_digest(source: str) -> str:
    """SHA-256 over the safetensors files below a folder (local path or URI), sorted by name.

    It covers each file's name and metadata, and every tensor's name, dtype, shape and bytes.

    Raises:
        ConfigError: the folder is missing, holds no safetensors file, or holds a damaged one.
    """
    digest = hashlib.sha256()
    for name, file in _files(source):
        with file:
            content = json.dumps([name, *_content(f"{source}/{name}", file)], sort_keys=True)
        digest.update(content.encode() + b"\n")
    return digest.hexdigest()


def are_weights(source: str, digest: str) -> bool:
    """Return whether a folder holds the weights of a digest; errors as for `weights_digest`.

    Digests of older releases, computed over the files' bytes, match too.
    """
    return digest == weights_digest(source) or digest == digest_of_bytes(source)


def is_copy(place: str, source: str, digest: str) -> bool:
    """Return whether a folder holds the weights of a digest, and every file that `source` has.

    An interrupted upload leaves some of them, a damaged disk others than they were.
    """
    if _sizes(source).keys() - _sizes(place).keys():
        return False
    try:
        return are_weights(place, digest)
    except ConfigError:  # no weights, or damaged ones
        return False


def has_files_of(place: str, source: str) -> bool:
    """Return whether a folder has weights, and every file of `source` in its size; no content is read."""
    held = _sizes(place)
    return bool(_weights_in(held)) and _sizes(source).items() <= held.items()


def digest_of_bytes(source: str) -> str:
    """SHA-256 over the files' names and bytes, as older releases registered it.

    Errors as for `weights_digest`.
    """
    digest = hashlib.sha256()
    for name, file in _files(source):
        digest.update(name.encode() + b"\0")
        with file:
            while block := file.read(BLOCK):
                digest.update(block)
    return digest.hexdigest()


def _files(source: str) -> Iterator[tuple[str, NativeFile]]:
    """Yield the name and an open stream of each safetensors file below a folder."""
    names = _weights_in(_sizes(source))
    if not names:
        raise ConfigError(f"{source}: holds no safetensors file; run the pipeline again to publish one")
    folder = Storage.open(source)
    for name in names:
        yield name, folder.filesystem.open_input_stream(f"{folder.path.rstrip('/')}/{name}")


def _weights_in(names: Iterable[str]) -> list[str]:
    return sorted(name for name in names if name.endswith(".safetensors"))


def _sizes(source: str) -> dict[str, int]:
    """Return the bytes of all files below a folder by name; empty if it does not exist."""
    folder = Storage.open(source)
    below = fs.FileSelector(folder.path, recursive=True, allow_not_found=True)
    found = folder.filesystem.get_file_info(below)
    files = (info for info in found if info.type == fs.FileType.File)
    return {info.path.removeprefix(folder.path).strip("/"): info.size for info in files}


def _content(path: str, file: NativeFile) -> tuple[dict[str, object], list[object]]:
    """Read a file's metadata and each tensor's (name, dtype, shape, sha256), sorted by name."""
    damaged = ConfigError(f"{path}: not a whole safetensors file; run the pipeline again to publish it")
    size = int.from_bytes(file.read(8), "little")
    if size > MAX_HEADER:
        raise damaged
    try:
        header = json.loads(file.read(size))
        metadata = {name: _canonical(text) for name, text in header.pop("__metadata__", {}).items()}
        places = sorted((each["data_offsets"], name) for name, each in header.items())
        position, digests = 0, {}
        for (start, end), name in places:
            if start != position:
                raise damaged
            digests[name], position = _digest_of(file, end - start), end
        tensors: list[object] = [
            [name, header[name]["dtype"], header[name]["shape"], digests[name]] for name in sorted(header)
        ]
    except (ValueError, TypeError, KeyError, AttributeError, EOFError):
        raise damaged from None
    return metadata, tensors


def _canonical(text: str) -> object:
    """Parse a metadata value as JSON, whose keys may be in any order; other text is returned unchanged."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _digest_of(file: NativeFile, size: int) -> str:
    """SHA-256 of the next `size` bytes; raises EOFError if there are fewer."""
    digest = hashlib.sha256()
    while size:
        block = file.read(min(BLOCK, size))
        if not block:
            raise EOFError
        digest.update(block)
        size -= len(block)
    return digest.hexdigest()
