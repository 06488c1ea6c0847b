"""Uniform access to local folders, s3:// and gs:// by pyarrow.fs (which Ray Data and Ray Train use too)."""

import hashlib
import json
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from pyarrow import NativeFile, fs

from ray_jobs.config import ConfigError, home

STORES = ("s3://", "gs://")
AZURE = ("az://", "abfs://", "abfss://", "adl://", "wasb://", "wasbs://", "azure://")


@dataclass(frozen=True)
class Storage:
    """A folder that every node can reach. Methods take names relative to it, with `/` as the separator.

    Attributes:
        uri: absolute local path, or s3:// or gs:// address; the `storage_path` for Ray Train and Tune.
        filesystem: the `filesystem` argument for Ray Data.
        path: the folder inside `filesystem`, the path argument for Ray Data.
    """

    uri: str
    filesystem: fs.FileSystem
    path: str

    @staticmethod
    def open(uri: str) -> "Storage":
        """Open a local folder (made absolute; it need not exist), s3://bucket/prefix or gs://bucket/prefix.

        For S3-compatible stores use `s3://bucket/prefix?endpoint_override=host:port`.

        Raises:
            ConfigError: the address is of another kind, or the store rejects it.
        """
        uri = _without_file(uri)
        if "://" not in uri:
            folder = str(home() / Path(uri).expanduser())
            return Storage(folder, fs.LocalFileSystem(), folder)
        if uri.startswith(AZURE):
            raise ConfigError(
                f"storage: {uri}: Azure storage is not supported; use s3://, gs:// or a local folder "
                "(for example a mounted container)"
            )
        if not uri.startswith(STORES):
            raise ConfigError(f"storage: {uri}: not supported; use a local folder, s3:// or gs://")
        try:
            filesystem, path = fs.FileSystem.from_uri(uri)
        except (OSError, ValueError) as error:
            raise ConfigError(f"storage: {uri}: {' '.join(str(error).split())}") from None
        return Storage(uri.rstrip("/"), filesystem, path)

    @property
    def is_local(self) -> bool:
        return "://" not in self.uri

    def child(self, *parts: str) -> "Storage":
        """Return the folder `parts` below this one; it need not exist."""
        below = "/".join(parts)
        if self.is_local:
            return Storage(f"{self.uri.rstrip('/')}/{below}", self.filesystem, self._at(below))
        address, mark, query = self.uri.partition("?")
        uri = f"{address.rstrip('/')}/{quote(below)}{mark}{query}"
        return Storage(uri, self.filesystem, self._at(below))

    def _at(self, name: str) -> str:
        return f"{self.path.rstrip('/')}/{name}"

    def exists(self, name: str = "") -> bool:
        """Return True if the file or folder `name` exists here (without a name: this folder itself)."""
        at = self._at(name).rstrip("/")
        return self.filesystem.get_file_info(at).type != fs.FileType.NotFound

    def folders(self) -> list[str]:
        """Return the sorted names of the folders directly below this one; empty if it does not exist."""
        # GCS lists a folder only if it has a placeholder object; others show up in the paths of their files.
        deep = isinstance(self.filesystem, fs.GcsFileSystem)
        found = set()
        for info in self._below(recursive=deep):
            name, slash, _ = info.path.removeprefix(self.path).strip("/").partition("/")
            if slash or info.type == fs.FileType.Directory:
                found.add(name)
        return sorted(found)

    def files(self) -> list[str]:
        """Return the sorted names of the files directly in this folder; empty if it does not exist."""
        return sorted(info.base_name for info in self._below() if info.type == fs.FileType.File)

    def sizes(self) -> dict[str, int]:
        """Return the bytes of all files below this folder, by path; empty if it does not exist."""
        files = (info for info in self._below(recursive=True) if info.type == fs.FileType.File)
        return {info.path.removeprefix(self.path).strip("/"): info.size for info in files}

    def _below(self, *, recursive: bool = False) -> list[fs.FileInfo]:
        selector = fs.FileSelector(self.path, recursive=recursive, allow_not_found=True)
        found: list[fs.FileInfo] = self.filesystem.get_file_info(selector)
        return found

    def read_bytes(self, name: str) -> bytes:
        """Return the content of a file; raise FileNotFoundError if it is missing."""
        with self.filesystem.open_input_stream(self._at(name), compression=None) as stream:
            return stream.read()

    def sha256(self, name: str) -> str:
        """Return the SHA-256 digest of a file in hexadecimal; raise FileNotFoundError if it is missing."""
        with self.filesystem.open_input_stream(self._at(name), compression=None) as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()

    def open_input(self, name: str) -> NativeFile:
        """Open a file for random access, without fetching all of it."""
        return self.filesystem.open_input_file(self._at(name))

    def read_text(self, name: str) -> str:
        """Return the content of a UTF-8 file; raise FileNotFoundError if it is missing."""
        return self.read_bytes(name).decode("utf-8")

    def write_bytes(self, name: str, content: bytes) -> None:
        """Write a file atomically: an interrupted write leaves the former content.

        Local files also survive a power failure.
        """
        target = self._at(name)
        if not self.is_local:  # an object appears only once its stream is closed
            with self.filesystem.open_output_stream(target, compression=None) as stream:
                stream.write(content)
            return
        with _replacing(target) as aside, open(aside, "xb") as file:
            file.write(content)

    def write_text(self, name: str, text: str) -> None:
        """Write a UTF-8 file atomically, see `write_bytes`."""
        self.write_bytes(name, text.encode("utf-8"))

    def read_json(self, name: str) -> dict[str, Any]:
        """Return the object of a JSON file; raise FileNotFoundError if it is missing.

        Raises:
            ConfigError: it is damaged.
        """
        return _object(self.read_bytes(name), f"{self.uri}/{name}")

    def read_lines(self, name: str) -> list[dict[str, Any]]:
        """Return the objects of a JSON Lines file; empty if there is no such file.

        Raises:
            ConfigError: a line is damaged.
        """
        lines = self.read_bytes(name).splitlines() if self.exists(name) else []
        return [_object(line, f"{self.uri}/{name}, line {number}") for number, line in enumerate(lines, 1)]

    def write_lines(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write a JSON Lines file atomically, one line per object, see `write_bytes`."""
        self.write_text(name, "".join(json.dumps(row) + "\n" for row in rows))

    def upload(self, local_folder: str | Path, name: str) -> None:
        """Copy a local folder here as `name`, replacing a folder of that name.

        In local storage the copy is atomic. In an object store the files directly in the folder, which
        readers open first (`model_index.json`), are deleted first and uploaded last, so readers never find a
        partial folder.
        """
        target = self._at(name)
        if self.is_local:
            with _replacing(target) as aside:
                shutil.copytree(local_folder, aside)
            return
        for file in self.child(name).files():
            self.delete(f"{name}/{file}")
        self.delete(name)
        self.filesystem.create_dir(target)
        for part in sorted(Path(local_folder).iterdir(), key=lambda part: (part.is_file(), part.name)):
            if part.is_dir():
                self.filesystem.create_dir(f"{target}/{part.name}")
            fs.copy_files(
                str(part),
                f"{target}/{part.name}",
                source_filesystem=fs.LocalFileSystem(),
                destination_filesystem=self.filesystem,
            )

    def local_copy(self, name: str = "") -> Path:
        """Return a local path to `name`: its own path in local storage, else that of a download.

        A download goes to a new temporary folder that the caller may delete.

        Raises:
            FileNotFoundError: there is no such file or folder.
        """
        source = self._at(name).rstrip("/")
        kind = self.filesystem.get_file_info(source).type
        if kind == fs.FileType.NotFound:
            raise FileNotFoundError(f"{self.uri}: contains no {name or 'files'}")
        if self.is_local:
            return Path(source)
        target = Path(tempfile.mkdtemp(prefix="diffray-")) / Path(source).name
        if kind == fs.FileType.File:
            target.write_bytes(self.read_bytes(name))
            return target
        fs.copy_files(
            source,
            str(target),
            source_filesystem=self.filesystem,
            destination_filesystem=fs.LocalFileSystem(),
        )
        return target

    def rename(self, name: str, to: str) -> None:
        """Rename a file; raise FileNotFoundError if it is missing, so that one of two callers succeeds."""
        if not self.exists(name):
            raise FileNotFoundError(f"{self.uri}/{name}")
        self.filesystem.move(self._at(name), self._at(to))

    def delete(self, name: str) -> None:
        """Delete a file, or a folder with its content; a missing one is not an error."""
        at = self._at(name)
        kind = self.filesystem.get_file_info(at).type
        if kind == fs.FileType.Directory:
            if isinstance(self.filesystem, fs.GcsFileSystem):
                self.filesystem.create_dir(at)  # the placeholder object, which is deleted last
            self.filesystem.delete_dir(at)
        elif kind == fs.FileType.File:
            self.filesystem.delete_file(at)


def canonical(uri: str) -> str:
    """Return an address by which two names of the same local folder, or of the same objects, are equal."""
    uri = _without_file(uri)
    if "://" in uri:
        return unquote(uri.partition("?")[0]).rstrip("/")
    return os.path.realpath(home() / Path(uri).expanduser())


def _without_file(uri: str) -> str:
    """Return the path of a file:// address; others as they are."""
    return unquote(uri.removeprefix("file://")) if uri.startswith("file://") else uri


def _object(text: bytes, where: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:  # neither JSON nor UTF-8
        found = None
    if not isinstance(found, dict):
        raise ConfigError(f"{where}: damaged; restore it, or delete the run")
    return found


@contextmanager
def _replacing(target: str) -> Iterator[str]:
    """Yield a free path beside `target`; the file or folder that the block creates there replaces it."""
    folder, name = os.path.split(target)
    os.makedirs(folder, exist_ok=True)
    aside = f"{folder}/.{name}.{uuid.uuid4().hex}.partial"
    try:
        yield aside
        for path in [aside, *(str(below) for below in Path(aside).rglob("*"))]:
            _flush(path)
        if os.path.isdir(aside) and os.path.isdir(target):
            former = f"{aside}.former"  # a folder cannot be renamed onto a non-empty one
            os.replace(target, former)
            os.replace(aside, target)
            shutil.rmtree(former)
        else:
            os.replace(aside, target)
        _flush(folder)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        Path(aside).unlink(missing_ok=True)
        raise


def _flush(path: str) -> None:
    """Flush a file's content, or a folder's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def slug(caption: str) -> str:
    """Convert a caption to a part of a file name: `A cat's face!` becomes `a-cat-s-face`."""
    return re.sub(r"[^a-z0-9]+", "-", caption.lower()).strip("-")[:40] or "caption"
