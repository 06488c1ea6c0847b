"""Folders of pictures that the page may read, and uploads into them."""

import csv
import hashlib
import io
import json
import os
import re
import tempfile
import unicodedata
from collections.abc import Sequence
from contextlib import suppress
from itertools import zip_longest
from pathlib import Path
from shutil import rmtree
from typing import Any

from pydantic import BaseModel

from ray_jobs.config import ConfigError, home
from ray_jobs.data.sources.listing import READ_SUFFIXES, TEXT_SUFFIX
from ray_jobs.data.sources.metadata import METADATA_FILES
from ray_jobs.data.sources.tables import CAPTION_COLUMNS
from ray_jobs.pictures.reading import MAX_PIXELS, Rejected, read_picture

MAX_BYTES = 64 << 20
"""Maximum size of an uploaded file, in bytes."""

COUNTED = 10_000
"""Number of entries of a folder up to which its pictures are counted."""

CAPTION_LISTS = tuple(name for name in METADATA_FILES if not name.endswith(".parquet"))

LONGEST = 150  # bytes of a file's name


class Folder(BaseModel):
    """A folder as the page shows it.

    Attributes:
        path: absolute path.
        above: the folder that it lies in; None if the page may not read that.
        folders: paths of the folders in it.
        pictures: number of pictures directly in it, among the first `COUNTED` entries.
        captioned: whether it has files of captions.
    """

    path: str
    above: str | None
    folders: list[str]
    pictures: int
    captioned: bool


class DataFolders:
    """Folders that were named at the start, with all that lies below them.

    Args:
        roots: folders, relative to `home()`, or s3:// and gs:// addresses.

    Raises:
        ConfigError: a folder does not exist.
    """

    def __init__(self, roots: Sequence[str]) -> None:
        self.addresses = [each.rstrip("/") for each in roots if "://" in each]
        self.roots = [(home() / Path(each).expanduser()).resolve() for each in roots if "://" not in each]
        for root in self.roots:
            if not root.is_dir():
                raise ConfigError(f"--folders: {root}: no such folder; make it, or name another one")

    @property
    def names(self) -> list[str]:
        """All of them, as the page shows them."""
        return [*map(str, self.roots), *self.addresses]

    def allowed(self, given: str) -> str:
        """Return a path as an absolute one, without symbolic links, or an address.

        Raises:
            ConfigError: it does not lie in a folder that the page may read.
        """
        if "://" in given:
            parts = given.split("/")
            if ".." not in parts and any(
                given == each or given.startswith(f"{each}/") for each in self.addresses
            ):
                return given
        elif given.strip() and "\0" not in given:
            path = (home() / Path(given).expanduser()).resolve()
            if any(path.is_relative_to(root) for root in self.roots):
                return str(path)
        raise ConfigError(
            f"data: {given or 'no folder'}: the page reads {', '.join(self.names)} only; choose a folder "
            "there, or start it with --folders"
        )

    def existing(self, given: str) -> str:
        """Return the same of a folder or file that exists; addresses are not looked at."""
        path = self.allowed(given)
        if "://" not in path and not os.path.exists(path):
            raise ConfigError(f"data: {given}: no such folder; correct the path, or upload pictures")
        return path

    def show(self, given: str) -> Folder:
        """Return what a local folder holds.

        Raises:
            ConfigError: the page may not read it, or it is no folder that can be listed.
        """
        path = Path(self.existing(given))
        above = str(path.parent) if any(path.parent.is_relative_to(root) for root in self.roots) else None
        folders, pictures, captioned = list[str](), 0, False
        try:
            with os.scandir(path) as entries:
                for number, entry in enumerate(entries):
                    name = entry.name.lower()
                    if name.startswith("."):
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
                    elif number < COUNTED:
                        pictures += name.endswith(READ_SUFFIXES)
                        captioned = captioned or name in METADATA_FILES or name.endswith(TEXT_SUFFIX)
        except OSError as error:
            raise ConfigError(f"data: {given}: {error.strerror}; choose a folder") from None
        return Folder(
            path=str(path), above=above, folders=sorted(folders), pictures=pictures, captioned=captioned
        )

    def save(self, folder: str, name: str, content: bytes) -> str:
        """Write an uploaded picture or file of captions, whole or not at all; return its name.

        A folder that does not exist yet is filled out of sight, until `finish`. Nothing is replaced. A list
        of captions names the pictures as they are saved.

        Raises:
            ConfigError: the page may not write there, the file is neither a picture that can be read nor
                captions, or another file has its name.
        """
        target = Path(self.allowed(folder))
        name = safe_name(name)
        _check(name, content)
        if name in CAPTION_LISTS:
            content = _with_saved_names(name, content.decode("utf-8-sig"), target).encode()
        if not os.path.isdir(target.parent):
            raise ConfigError(f"data: {folder}: {target.parent} is no folder; choose one that exists")
        place = target
        try:
            if not target.exists():
                place = self._unfinished(target)
                place.mkdir(parents=True, exist_ok=True)
            descriptor, aside = tempfile.mkstemp(prefix=".upload-", dir=place)
            try:
                with open(descriptor, "wb") as file:
                    file.write(content)
                os.chmod(aside, 0o644)
                _give_name(aside, place / name)
            finally:
                Path(aside).unlink(missing_ok=True)
        except FileExistsError:
            if (place / name).is_file() and (place / name).read_bytes() == content:
                return name
            raise ConfigError(
                f"{name}: {target} has another file of this name; rename it, or choose a new folder"
            ) from None
        except OSError as error:
            raise ConfigError(f"{target}: {error.strerror}") from None
        return name

    def finish(self, folder: str) -> None:
        """Give an uploaded folder its name; one that exists already, and was added to, stays as it is.

        Raises:
            ConfigError: the page may not write there, or nothing was uploaded for it.
        """
        target = Path(self.allowed(folder))
        unfinished = self._unfinished(target)
        try:
            if target.exists() and not unfinished.exists():
                return
            unfinished.rename(target)  # not onto a folder with files, which was made meanwhile
            with suppress(OSError):  # another upload goes on
                unfinished.parent.rmdir()
        except FileNotFoundError:
            raise ConfigError(f"data: {folder}: nothing was uploaded for it; upload pictures") from None
        except OSError as error:
            raise ConfigError(f"{target}: {error.strerror}") from None

    def delete_unfinished(self) -> None:
        """Delete what uploads have left that were not finished."""
        for root in self.roots:
            rmtree(root / self._aside, ignore_errors=True)

    @property
    def _aside(self) -> str:
        """Name of the folder, in that which the page may read, for uploads that are not finished.

        Of pages that are opened in different folders, each has its own.
        """
        return f".diffray-uploads-{_digest(home())}"

    def _unfinished(self, target: Path) -> Path:
        root = next(root for root in self.roots if target.is_relative_to(root))
        return root / self._aside / _digest(target)


def _digest(path: Path) -> str:
    return hashlib.sha256(str(path).encode()).hexdigest()[:12]


def _give_name(file: str, name: Path) -> None:
    """Give a file a name that none has; raises FileExistsError if one has it, unlike a rename."""
    try:
        os.link(file, name)
    except FileExistsError:
        raise
    except OSError:  # exFAT and some network drives have no links
        name.open("x").close()
        os.replace(file, name)


def safe_name(given: str) -> str:
    """Return a file's name without folders and without characters that programs or shells could mistake."""
    name = unicodedata.normalize("NFC", re.split(r"[/\\]", given)[-1])  # macOS sends accents apart
    stem, suffix = os.path.splitext(re.sub(r"[^\w .()+-]", "_", name).strip(" ."))
    stem = stem.encode()[:LONGEST].decode(errors="ignore").lstrip("-")
    return f"{stem or 'picture'}{suffix}"


def _with_saved_names(list_name: str, text: str, folder: Path) -> str:
    """Return a list of captions with `safe_name` of the pictures that it names, but for those in `folder`.

    A line that cannot be read stays as it is: prepare says which it is.
    """

    def saved(column: str | None, value: Any) -> Any:
        if isinstance(value, list):
            return [saved(column, each) for each in value]
        is_picture = isinstance(value, str) and value.lower().endswith(READ_SUFFIXES)
        if not is_picture or column in CAPTION_COLUMNS:
            return value
        place = folder / value
        is_inside = place.is_relative_to(folder) and ".." not in place.parts
        return value if is_inside and os.path.exists(place) else safe_name(value)

    def of_line(line: str) -> str:
        try:
            fields = json.loads(line)
        except ValueError:
            return line
        if not isinstance(fields, dict):
            return line
        named = {column: saved(column, value) for column, value in fields.items()}
        return line if named == fields else json.dumps(named, ensure_ascii=False)

    if list_name.endswith(".jsonl"):
        return "\n".join(map(of_line, text.split("\n")))
    try:
        head, *rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    except (csv.Error, ValueError):
        return text
    named = [[saved(*each) for each in zip_longest(head[: len(row)], row)] for row in rows]
    if named == rows:
        return text
    written = io.StringIO(newline="")
    csv.writer(written, lineterminator="\n").writerows([head, *named])
    return written.getvalue()


def _check(name: str, content: bytes) -> None:
    """Raise ConfigError unless a file is a picture that prepare can read, or captions."""
    suffix = os.path.splitext(name)[1].lower()
    if suffix == TEXT_SUFFIX or name in CAPTION_LISTS:
        try:
            content.decode()
        except UnicodeDecodeError:
            raise ConfigError(f"{name}: captions must be UTF-8 text") from None
    elif suffix in READ_SUFFIXES:
        try:
            read_picture(content, background="white", max_pixels=MAX_PIXELS)
        except Rejected as error:
            raise ConfigError(f"{name}: not a picture that can be read ({error.detail})") from None
    else:
        raise ConfigError(
            f"{name}: neither a picture ({', '.join(READ_SUFFIXES[:9])}, ...) nor captions "
            f"({TEXT_SUFFIX} beside a picture, {', '.join(CAPTION_LISTS)})"
        )
