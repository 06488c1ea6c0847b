"""What identifies a folder of weights: its tensors, not the bytes of its files.

safetensors writes a header's metadata in another order in each process, so that the same adapter saved twice
is two different files (safetensors 0.8).
"""

import hashlib
import json
from collections.abc import Iterator
from typing import Any

from pyarrow import NativeFile, fs

from cluster.storage import Storage
from ray_jobs.config import ConfigError

BLOCK = 1 << 20  # bytes read at once
MAX_HEADER = 100_000_000  # bytes; safetensors' own limit


def weights_digest(source: str) -> str:
    """sha256 over the safetensors files below a folder (local path or URI), sorted by name: of each its name,
    its metadata, and every tensor's name, dtype, shape and bytes.

    Raises:
        ConfigError: if the folder is missing, holds no safetensors file, or one that is damaged.
    """
    digest = hashlib.sha256()
    for name, file in _files(source):
        with file:
            content = json.dumps([name, *_content(f"{source}/{name}", file)], sort_keys=True)
        digest.update(content.encode() + b"\n")
    return digest.hexdigest()


def are_weights(source: str, digest: str) -> bool:
    """Whether a folder holds the weights of a digest, also of one that an older release has registered, which
    took the files' bytes; errors as of `weights_digest`."""
    return digest == weights_digest(source) or digest == digest_of_bytes(source)


def digest_of_bytes(source: str) -> str:
    """The digest that older releases registered: sha256 over the files' names and bytes. Errors as of
    `weights_digest`."""
    digest = hashlib.sha256()
    for name, file in _files(source):
        digest.update(name.encode() + b"\0")
        with file:
            while block := file.read(BLOCK):
                digest.update(block)
    return digest.hexdigest()


def _files(source: str) -> Iterator[tuple[str, NativeFile]]:
    """Name and content of each file below a folder."""
    folder = Storage.open(source)
    below = fs.FileSelector(folder.path, recursive=True, allow_not_found=True)
    found = folder.filesystem.get_file_info(below)
    paths = sorted(info.path for info in found if info.path.endswith(".safetensors"))
    if not paths:
        raise ConfigError(f"{source}: holds no safetensors file; run the pipeline again to publish one")
    for path in paths:
        yield path.removeprefix(folder.path).strip("/"), folder.filesystem.open_input_stream(path)


def _content(path: str, file: NativeFile) -> tuple[dict[str, Any], list[Any]]:
    """Metadata, and (name, dtype, shape, sha256) of each tensor in the order of their names."""
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
        tensors = [
            [name, header[name]["dtype"], header[name]["shape"], digests[name]] for name in sorted(header)
        ]
    except (ValueError, TypeError, KeyError, AttributeError, EOFError):
        raise damaged from None
    return metadata, tensors


def _canonical(text: str) -> Any:
    """Metadata, whose JSON may be written in any order."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _digest_of(file: NativeFile, size: int) -> str:
    """Of the next so many bytes; EOFError if there are fewer."""
    digest = hashlib.sha256()
    while size:
        block = file.read(min(BLOCK, size))
        if not block:
            raise EOFError
        digest.update(block)
        size -= len(block)
    return digest.hexdigest()
