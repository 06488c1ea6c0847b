"""One view over local folders, s3:// and gs://, by pyarrow.fs (which Ray Data and Ray Train use too)."""

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

AZURE = ("az://", "abfs://", "abfss://", "adl://", "wasb://", "wasbs://", "azure://")


@dataclass(frozen=True)
class Storage:
    """A folder that every node can reach. Names given to its methods are relative to it, with `/`.

    Attributes:
        uri: absolute local path, or the s3:// or gs:// address; what Ray Train and Tune take as
            `storage_path`.
        filesystem: what Ray Data takes as `filesystem`.
        path: the folder inside `filesystem`, what Ray Data takes as path.
    """

    uri: str
    filesystem: fs.FileSystem
    path: str

    @staticmethod
    def open(uri: str) -> "Storage":
        """`uri`: a local folder (made absolute; it need not exist), s3://bucket/prefix or gs://bucket/prefix.

        S3-compatible stores take `s3://bucket/prefix?endpoint_override=host:port`.

        Raises:
            ConfigError: if the address is of another kind or the store does not know it.
        """
        if uri.startswith("file://"):
            uri = unquote(uri.removeprefix("file://"))
        if "://" not in uri:
            folder = str(home() / Path(uri).expanduser())
            return Storage(folder, fs.LocalFileSystem(), folder)
        if uri.startswith(AZURE):
            raise ConfigError(
                f"storage: {uri}: Azure's storage is not offered; give a local folder (a mounted "
                "container is one), s3:// or gs://"
            )
        if not uri.startswith(("s3://", "gs://")):
            raise ConfigError(f"storage: {uri}: give a local folder, s3:// or gs://")
        try:
            filesystem, path = fs.FileSystem.from_uri(uri)
        except (OSError, ValueError) as error:
            raise ConfigError(f"storage: {uri}: {' '.join(str(error).split())}") from None
        return Storage(uri.rstrip("/"), filesystem, path)

    @property
    def is_local(self) -> bool:
        return "://" not in self.uri

    def child(self, *parts: str) -> "Storage":
        """The folder `parts` below this one; it need not exist."""
        below = "/".join(parts)
        if self.is_local:
            return Storage(f"{self.uri.rstrip('/')}/{below}", self.filesystem, self._at(below))
        address, mark, query = self.uri.partition("?")
        uri = f"{address.rstrip('/')}/{quote(below)}{mark}{query}"
        return Storage(uri, self.filesystem, self._at(below))

    def _at(self, name: str) -> str:
        return f"{self.path.rstrip('/')}/{name}"

    def exists(self, name: str = "") -> bool:
        """Whether `name` is a file or folder here (without a name: this folder itself)."""
        at = self._at(name).rstrip("/")
        return self.filesystem.get_file_info(at).type != fs.FileType.NotFound

    def folders(self) -> list[str]:
        """The names of the folders directly below this one; none if it does not exist."""
        # Google's storage lists a folder only where an object stands for it; others show in the names below.
        deep = isinstance(self.filesystem, fs.GcsFileSystem)
        found = set()
        for info in self._below(recursive=deep):
            name, slash, _ = info.path.removeprefix(self.path).strip("/").partition("/")
            if slash or info.type == fs.FileType.Directory:
                found.add(name)
        return sorted(found)

    def files(self) -> list[str]:
        """The names of the files directly in this folder; none if it does not exist."""
        return sorted(info.base_name for info in self._below() if info.type == fs.FileType.File)

    def _below(self, *, recursive: bool = False) -> list[fs.FileInfo]:
        selector = fs.FileSelector(self.path, recursive=recursive, allow_not_found=True)
        found: list[fs.FileInfo] = self.filesystem.get_file_info(selector)
        return found

    def read_bytes(self, name: str) -> bytes:
        """The content of a file; FileNotFoundError if it is missing."""
        with self.filesystem.open_input_stream(self._at(name), compression=None) as stream:
            return stream.read()

    def sha256(self, name: str) -> str:
        """The digest of a file's content, in hexadecimal; FileNotFoundError if it is missing."""
        with self.filesystem.open_input_stream(self._at(name), compression=None) as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()

    def open_input(self, name: str) -> NativeFile:
        """A file for reading at any place, without the rest being fetched."""
        return self.filesystem.open_input_file(self._at(name))

    def read_text(self, name: str) -> str:
        """The content of a UTF-8 file; FileNotFoundError if it is missing."""
        return self.read_bytes(name).decode("utf-8")

    def write_bytes(self, name: str, content: bytes) -> None:
        """Write a file whole or not at all: an interrupted write leaves the former content.

        Of a local one that holds for a machine that loses its power too.
        """
        target = self._at(name)
        if not self.is_local:  # where what is written appears once its stream was closed
            with self.filesystem.open_output_stream(target, compression=None) as stream:
                stream.write(content)
            return
        with _replacing(target) as aside, open(aside, "xb") as file:
            file.write(content)

    def write_text(self, name: str, text: str) -> None:
        """`write_bytes`, in UTF-8."""
        self.write_bytes(name, text.encode("utf-8"))

    def read_lines(self, name: str) -> list[dict[str, Any]]:
        """The objects of a file of JSON lines; none if there is no such file."""
        return [json.loads(line) for line in self.read_text(name).splitlines()] if self.exists(name) else []

    def write_lines(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """`write_bytes`, a line of JSON an object."""
        self.write_text(name, "".join(json.dumps(row) + "\n" for row in rows))

    def upload(self, local_folder: str | Path, name: str) -> None:
        """Copy a local folder here as `name`, in place of a folder of that name.

        A local one appears whole. In an object store the files directly in the folder, which readers look for
        first (`model_index.json`), go first and come last, so what is not whole is not found.
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
        """A local path with the content of `name`: itself where the storage is local, else a download.

        A download goes to a new temporary folder that the caller may delete.

        Raises:
            FileNotFoundError: if there is no such file or folder.
        """
        source = self._at(name).rstrip("/")
        kind = self.filesystem.get_file_info(source).type
        if kind == fs.FileType.NotFound:
            raise FileNotFoundError(f"{self.uri}: holds no {name or 'files'}")
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
        """Give a file another name; FileNotFoundError if it is missing, so that one of two succeeds."""
        if not self.exists(name):
            raise FileNotFoundError(f"{self.uri}/{name}")
        self.filesystem.move(self._at(name), self._at(to))

    def delete(self, name: str) -> None:
        """Delete a file or a folder with all it holds; a missing one is fine."""
        at = self._at(name)
        kind = self.filesystem.get_file_info(at).type
        if kind == fs.FileType.Directory:
            if isinstance(self.filesystem, fs.GcsFileSystem):
                self.filesystem.create_dir(at)  # the object that stands for it, which is deleted last
            self.filesystem.delete_dir(at)
        elif kind == fs.FileType.File:
            self.filesystem.delete_file(at)


@contextmanager
def _replacing(target: str) -> Iterator[str]:
    """A free name beside `target`, on the same disk; what the block makes there takes the target's place."""
    folder, name = os.path.split(target)
    os.makedirs(folder, exist_ok=True)
    aside = f"{folder}/.{name}.{uuid.uuid4().hex}.partial"
    try:
        yield aside
        for path in [aside, *(str(below) for below in Path(aside).rglob("*"))]:
            _flush(path)
        if os.path.isdir(aside) and os.path.isdir(target):
            former = f"{aside}.former"  # a folder cannot be renamed onto one that holds something
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
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def slug(caption: str) -> str:
    """A caption as part of a file's name: `A cat's face!` becomes `a-cat-s-face`."""
    return re.sub(r"[^a-z0-9]+", "-", caption.lower()).strip("-")[:40] or "caption"
