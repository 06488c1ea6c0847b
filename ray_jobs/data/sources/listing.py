"""The files of a source, from one look at them, and what their names say."""

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

Stamp = tuple[int, int | None]  # of a file: its size in bytes, and when it changed, in ns since 1970

READ_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".pjpeg", ".pjp", ".png", ".apng", ".webp", ".gif", ".tif", ".tiff"),
    *(".bmp", ".dib", ".avif", ".avifs", ".heic", ".heif", ".hif"),
)
# Pictures that are not read: a file of theirs is a row that is set aside, not a file that nobody sees.
OTHER_SUFFIXES = (
    *(".jp2", ".j2k", ".jpf", ".jpx", ".jxl", ".jxr", ".svg", ".svgz", ".ico", ".icns", ".psd", ".tga"),
    *(".qoi", ".ppm", ".pgm", ".pbm", ".pnm", ".exr", ".hdr", ".dds", ".eps", ".xcf"),
    *(".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf", ".pef", ".srw", ".raw"),
)
PICTURE_SUFFIXES = (*READ_SUFFIXES, *OTHER_SUFFIXES)
TEXT_SUFFIX = ".txt"
FILES_A_PIECE = 4096  # that are left out

# Words for a split in names of files and folders, and the split: as the datasets library takes them.
SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
SPLIT_FILE = re.compile(rf"(?:.*[-_.])?({'|'.join(SPLIT_WORDS)})(?:[-_.].*)?\.(?:parquet|arrow|tar)")


@dataclass(frozen=True)
class Listing:
    """The files of a source, from one look at them."""

    name: str  # the path as the user wrote it, for messages
    filesystem: fs.FileSystem
    folder: str  # within `filesystem`
    files: dict[str, Stamp]  # by their path below `folder`
    links: dict[str, str] = field(default_factory=dict)  # path -> why this link or special file is not read

    def ending(self, *suffixes: str) -> list[str]:
        """The names of files with one of `suffixes` (lower case), sorted, without hidden ones."""
        return sorted(name for name in self.files if name.lower().endswith(suffixes) and not is_hidden(name))

    def pictures(self) -> list[str]:
        """The files that are pictures, sorted.

        One in a format that is not read is left out beside one of the same name that is: `IMG_1.CR2` beside
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
        """The content of a small file."""
        with self.filesystem.open_input_file(f"{self.folder}/{name}") as file:
            return bytes(file.read())

    def splits(self) -> dict[str, str | None]:
        """The split that the name of each file, or of a folder above it, tells; None: none."""
        return {name: split_of(name) for name in self.files}

    def left_out(self, used: Collection[str], reason: str, detail: str, first: int) -> Iterator[Piece]:
        """The files that are not `used`: pictures with `reason` and `detail`, others counted by suffix.

        Args:
            used: paths below the folder; a link to a folder counts as used if one of them lies behind it.
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
    """Whether a file, or a folder above it, has a name that begins with a dot."""
    return any(part.startswith(".") for part in name.split("/"))


def split_of(name: str) -> str | None:
    """The split of a file: `data/train-00000-of-00002.parquet`, `test/metadata.csv`; None: it tells none.

    Of a picture only the folders tell: `train-station.jpg` belongs to no split.
    """
    *folders, file = name.lower().split("/")
    for folder in folders:
        if folder in SPLIT_WORDS:
            return SPLIT_WORDS[folder]
    found = SPLIT_FILE.fullmatch(file)
    return SPLIT_WORDS[found[1]] if found else None


def file_stamp(path: str) -> Stamp | None:
    """Of a local file; None if it is missing or is not a file."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):  # ValueError: a name with a zero byte, which no file has
        return None
    return (found.st_size, found.st_mtime_ns) if stat.S_ISREG(found.st_mode) else None


def list_files(path: str, apart: Storage | None = None) -> Listing:
    """All files below a folder, or the one .parquet, .arrow or .tar file that `path` names.

    Args:
        apart: a folder whose files are not listed where it lies below `path`: what runs write there is no
            part of a source, which would be another one after each of them.

    Raises:
        ConfigError: there is no such folder or file.
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
            f"data.source: {path}: no such folder; name one with pictures and metadata.jsonl, "
            "or with .parquet, .arrow or .tar files, or one such file"
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
    """Regular files and links to such; and what is neither, with the reason.

    Links to folders are not followed: they can lead in circles. FileSelector does follow them, up to the
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
