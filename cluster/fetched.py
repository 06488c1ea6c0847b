"""Download models and networks from object stores to this node, once and atomically.

They are cached in `DIFFRAY_CACHE`, by default `~/.cache/diffray`. The cache key covers the address and the
names, sizes and modification times of its files, so replaced files are downloaded again.
"""

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pyarrow import fs

from cluster.storage import STORES, Storage
from ray_jobs.config import ConfigError, resolve_path


def local_path(path: str, field: str = "model.base") -> str:
    """Return the local path of a file or folder, downloading it first from s3:// or gs://.

    Local paths and hub names are passed to `resolve_path`.

    Args:
        field: the setting that the path comes from, for error messages.

    Raises:
        ConfigError: there is nothing at the address, or the download fails.
    """
    if not path.startswith(STORES):
        return resolve_path(path)
    where = without_keys(path)
    try:
        storage = Storage.open(path)
        found = _listed(storage)
        if not found:
            raise ConfigError(f"{field}: {where}: there are no files; correct the address")
        identity = hashlib.sha256(json.dumps([where, found]).encode()).hexdigest()[:32]
        target = cache_folder() / identity / Path(storage.path).name
        with _alone(target.parent):
            if not target.exists():
                _fetch(storage, target)
    except OSError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{field}: {where}: cannot be downloaded: {reason}") from None
    return str(target)


def without_keys(path: str) -> str:
    """Return an address in an object store without its keys and options; other paths as they are."""
    if not path.startswith(STORES):
        return path
    scheme, _, place = path.partition("?")[0].partition("://")
    return f"{scheme}://{place.rpartition('@')[2]}"


def _listed(storage: Storage) -> list[tuple[str, int, int]]:
    """List path, size in bytes and modification time (ns since 1970) of each file at an address."""
    info = storage.filesystem.get_file_info(storage.path)
    found = [info]
    if info.type != fs.FileType.File:
        found = storage.filesystem.get_file_info(
            fs.FileSelector(storage.path, recursive=True, allow_not_found=True)
        )
    files = [each for each in found if each.type == fs.FileType.File]
    return sorted((each.path, each.size, each.mtime_ns or 0) for each in files)


def _fetch(storage: Storage, target: Path) -> None:
    """Copy the file or folder at an address to `target`; `target` appears only once the copy is complete."""
    aside = target.parent / f".{uuid.uuid4().hex}.partial"
    try:
        destination = aside / target.name
        is_file = storage.filesystem.get_file_info(storage.path).type == fs.FileType.File
        (aside if is_file else destination).mkdir(parents=True)
        fs.copy_files(
            storage.path,
            str(destination),
            source_filesystem=storage.filesystem,
            destination_filesystem=fs.LocalFileSystem(),
        )
        os.replace(destination, target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def cache_folder() -> Path:
    """Return the cache folder, or one in the temporary folder if it cannot be created."""
    folder = Path(os.environ.get("DIFFRAY_CACHE") or Path.home() / ".cache" / "diffray")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    except OSError:  # a container whose home is read-only
        folder = Path(tempfile.gettempdir()) / "diffray-cache"
        folder.mkdir(exist_ok=True)
        return folder


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold a lock that admits one process of this node at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
