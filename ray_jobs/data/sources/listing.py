"""Listing of a source's files, taken once, and information from their names."""

import os
import posixpath
import re
import stat
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from functools import cached_property

from pyarrow import fs

from cluster.storage import Storage
from ray_jobs.config import ConfigError, resolve_path
from ray_jobs.data.sources.samples import LeftOut, Piece, fingerprint, legible, suffix_text

Stamp = tuple[int, int | None]  # size of a file in bytes, and modification time in ns since 1970

READ_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".pjpeg", ".pjp", ".png", ".apng", ".webp", ".gif", ".tif", ".tiff"),
    *(".bmp", ".dib", ".avif", ".avifs", ".heic", ".heif", ".hif"),
)
# Picture formats that are not read: such a file becomes a rejected row and is not ignored silently.
OTHER_SUFFIXES = (
    *(".jp2", ".j2k", ".jpf", ".jpx", ".jxl", ".jxr", ".svg", ".svgz", ".ico", ".icns", ".psd", ".tga"),
    *(".qoi", ".ppm", ".pgm", ".pbm", ".pnm", ".exr", ".hdr", ".dds", ".eps", ".xcf"),
    *(".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf", ".pef", ".srw", ".raw"),
)
PICTURE_SUFFIXES = (*READ_SUFFIXES, *OTHER_SUFFIXES)
TEXT_SUFFIX = ".txt"
FILES_A_PIECE = 4096  # left-out files per piece

# Words in names of files and folders that indicate a split, as in the datasets library.
SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
SPLIT_FILE = re.compile(rf"(?:.*[-_.])?({'|'.join(SPLIT_WORDS)})(?:[-_.].*)?\.(?:parquet|arrow|tar)")


@dataclass(frozen=True)
class Listing:
    """Files of a source, listed once."""

    name: str  # the path as the user wrote it, for messages
    filesystem: fs.FileSystem
    folder: str  # within `filesystem`
    files: dict[str, Stamp]  # by their path below `folder`
    links: dict[str, str] = field(default_factory=dict)  # path -> why this link or special file is not read

    def ending(self, *suffixes: str) -> list[str]:
        """Names of files with one of `suffixes` (lower case), sorted, without hidden files."""
        return sorted(name for name in self.files if name.lower().endswith(suffixes) and not is_hidden(name))

    def pictures(self) -> list[str]:
        """Picture files, sorted.

        A file in an unread format is omitted if a readable one has the same name: `IMG_1.CR2` with
        `IMG_1.JPG`.
        """
        return [name for name in self.ending(*PICTURE_SUFFIXES) if not self._is_other(name)]

    def _is_other(self, name: str) -> bool:
        stem, suffix = posixpath.splitext(name)
        return suffix.lower() in OTHER_SUFFIXES and stem in self._readable

    @cached_property
    def _readable(self) -> set[str]:
        return {posixpath.splitext(name)[0] for name in self.ending(*READ_SUFFIXES)}

    def read_bytes(self, name: str) -> bytes:
        """Read a small file."""
        with self.filesystem.open_input_file(f"{self.folder}/{name}") as file:
            return bytes(file.read())

    def splits(self) -> dict[str, str | None]:
        """Split of each file, from its name or that of a parent folder; None if neither names one."""
        return {name: split_of(name) for name in self.files}

    def left_out(self, used: Collection[str], reason: str, detail: str, first: int) -> Iterator[Piece]:
        """Yield pieces of unused files: pictures with `reason` and `detail`, others counted by suffix.

        Args:
            used: paths below the folder; a link to a folder counts as used if it leads to one of them.
            first: number of the first piece.
        """
        files, others = list[tuple[str, str, str]](), Counter[str]()
        for name in sorted(self.files.keys() - set(used)):
            if is_hidden(name):
                others["hidden"] += 1
            elif self._is_other(name):
                files.append(
                    (name, "other_member", "a picture of the same name, in a format that is read, is used")
                )
            elif name.lower().endswith(PICTURE_SUFFIXES):
                files.append((name, reason, detail))
            else:
                others[posixpath.splitext(name)[1].lower() or "without a suffix"] += 1
        for name, why in sorted(self.links.items()):
            if not is_hidden(name) and not any(each == name or each.startswith(name + "/") for each in used):
                files.append((name, "unusable_link", why))
        if others:
            files.append((self.name, "no_picture", suffix_text(others)))
        for start in range(0, len(files), FILES_A_PIECE):
            some = tuple(files[start : start + FILES_A_PIECE])
            digest = fingerprint("left out", self.folder, some)
            yield LeftOut(first + start // FILES_A_PIECE, "files that are not read", digest, some)


def is_hidden(name: str) -> bool:
    """Return whether the name of a file, or of a parent folder, starts with a dot."""
    return any(part.startswith(".") for part in name.split("/"))


def split_of(name: str) -> str | None:
    """Return a file's split, as in `data/train-00000-of-00002.parquet` or `test/metadata.csv`, or None.

    For a picture only the folders count: `train-station.jpg` belongs to no split.
    """
    *folders, file = name.lower().split("/")
    for folder in folders:
        if folder in SPLIT_WORDS:
            return SPLIT_WORDS[folder]
    found = SPLIT_FILE.fullmatch(file)
    return SPLIT_WORDS[found[1]] if found else None


def file_stamp(path: str) -> Stamp | None:
    """Stamp of a local file; None if it is missing or not a regular file."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):  # ValueError: a name with a null byte, which no file has
        return None
    return (found.st_size, found.st_mtime_ns) if stat.S_ISREG(found.st_mode) else None


def list_files(path: str, apart: Storage | None = None) -> Listing:
    """List all files below a folder, or the one .parquet, .arrow or .tar file that `path` names.

    Args:
        apart: folder to exclude if it is below `path`. Files that runs write there are not part of the
            source, which would otherwise change after each run.

    Raises:
        ConfigError: the folder or file does not exist.
        OSError: it cannot be read.
    """
    storage = Storage.open(resolve_path(path))
    filesystem, root = storage.filesystem, storage.path.rstrip("/")
    found = filesystem.get_file_info(root)
    if found.type == fs.FileType.File and root.lower().endswith((".parquet", ".arrow", ".tar")):
        folder, name = posixpath.split(root)
        return Listing(path, filesystem, folder, {name: (found.size, found.mtime_ns)})
    if found.type != fs.FileType.Directory:
        raise ConfigError(
            f"data.source: {path}: no such folder; give a folder of pictures with "
            "metadata.jsonl, a folder of .parquet, .arrow or .tar files, or one such file"
        )
    if storage.is_local:
        files, links = _local_files(root)
    else:
        infos = filesystem.get_file_info(fs.FileSelector(root, recursive=True))
        found_files = (info for info in infos if info.type == fs.FileType.File)
        files = {info.path[len(root) + 1 :]: (info.size, info.mtime_ns) for info in found_files}
        links = {}
    if apart and type(apart.filesystem) is type(filesystem) and apart.path.startswith(f"{root}/"):
        below = apart.path.removeprefix(f"{root}/").rstrip("/") + "/"
        files = {name: stamp for name, stamp in files.items() if not name.startswith(below)}
        links = {name: why for name, why in links.items() if not name.startswith(below)}
    return Listing(path, filesystem, root, files, links)


def _local_files(root: str) -> tuple[dict[str, Stamp], dict[str, str]]:
    """List regular files and links to them; also other entries, with the reason for not reading them.

    Links to folders are not followed, since they can form cycles. FileSelector does follow them, up to the
    system's limit of 40, for every such link.
    """

    def fail(error: OSError) -> None:
        raise error

    files, links = dict[str, Stamp](), dict[str, str]()
    for folder, folders, names in os.walk(root, onerror=fail):
        below = os.path.relpath(folder, root) + "/" if folder != root else ""
        for name in folders:
            if os.path.islink(os.path.join(folder, name)):
                links[below + name] = "a link to a folder; such links are not followed"
        for name in names:
            stamp = file_stamp(os.path.join(folder, name))
            if stamp:
                files[below + name] = stamp
            elif name.lower().endswith(PICTURE_SUFFIXES):
                links[legible(below + name)] = "no file: a link to nothing, or a pipe or device"
    return files, links
