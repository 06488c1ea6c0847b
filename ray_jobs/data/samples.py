"""What a source of captioned pictures is: a list of pieces, of which each yields samples.

Nothing here needs Ray. A piece is what one task reads.
"""

import hashlib
import os
import re
import stat
from abc import ABC, abstractmethod
from collections.abc import Container, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

from pyarrow import fs

from ray_jobs.data.images import Rejected

Role = Literal["instance", "class"]
Stamp = tuple[int, int | None]  # of a file: its size in bytes, and when it changed, in ns since 1970

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".tif", ".tiff", ".bmp")


@dataclass(frozen=True)
class Sample:
    """A captioned picture as it lies in its source, not decoded; or the reason why there is none."""

    row: int  # number within its piece, from 0
    name: str  # what a person finds it by
    text: str  # the caption; "" where `problem` says why
    data: bytes  # of the picture's file; b"" where `problem` is set
    stratum: str  # value of the column that data.stratify names, else ""
    role: Role
    problem: Rejected | None  # why it cannot be used, found without decoding the picture


@dataclass(frozen=True)
class Piece:
    """What one task reads; the kinds of sources add what their reading needs."""

    number: int  # within its source, from 0
    name: str  # for messages
    digest: str  # sha256, hexadecimal: another one where what `read` yields can have changed


@dataclass(frozen=True)
class Source(ABC):
    """A place with captioned pictures. It can be pickled, and so can its pieces."""

    name: str  # the path as the user wrote it
    num_rows: int | None  # None where only reading tells (tar)
    pieces: list[Piece] = field(repr=False)

    @cached_property
    def digest(self) -> str:
        """Of all pieces, in their order."""
        return fingerprint(*[piece.digest for piece in self.pieces])

    def reader(self) -> "Source":
        """A copy to send to tasks: it lists no pieces (they can be large) and reads those it is given."""
        return replace(self, pieces=[])

    @abstractmethod
    def read(self, piece: Piece, wanted: Container[int] | None = None) -> Iterator[Sample]:
        """The samples of a piece in order: all, or those whose row is in `wanted`.

        What is wrong with a sample is its `problem`; nothing is raised for it.
        """


@dataclass(frozen=True)
class Listing:
    """The files of a source, from one look at them."""

    name: str  # the path as the user wrote it, for messages
    filesystem: fs.FileSystem
    folder: str  # within `filesystem`
    files: dict[str, Stamp]  # by their path below `folder`

    def ending(self, *suffixes: str) -> list[str]:
        """The names of files with one of `suffixes` (lower case), sorted, without hidden ones."""
        return sorted(
            name
            for name in self.files
            if name.lower().endswith(suffixes) and not any(part.startswith(".") for part in name.split("/"))
        )


def file_stamp(path: str) -> Stamp | None:
    """Of a local file; None if it is missing or is not a file."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):  # ValueError: a name with a zero byte, which no file has
        return None
    return (found.st_size, found.st_mtime_ns) if stat.S_ISREG(found.st_mode) else None


def fingerprint(*parts: object) -> str:
    """The sha256 of plain values, in hexadecimal."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def legible(text: str) -> str:
    """Text that can be stored as UTF-8: lone surrogates (what bytes became that did not decode) replaced."""
    return re.sub(r"[\ud800-\udfff]", "\N{REPLACEMENT CHARACTER}", text)


def check_caption(text: str | None) -> str:
    """`text` without white space at its ends, if it can be a caption; raises Rejected otherwise."""
    if text is None:
        raise Rejected("missing_caption", "there is no text")
    if not text.strip():
        raise Rejected("empty_caption", "the text is empty")
    return text.strip()


def decode_caption(data: bytes) -> str:
    """The caption in a text file or a binary column; raises Rejected if there is none."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Rejected("caption_not_utf8", f"byte {error.start} of the text is not UTF-8") from None
    return check_caption(text)


def broken_sample(piece: Piece, row: int, name: str, error: Exception) -> Sample:
    """What stands for the rest of a piece that cannot be read on, from `row`."""
    problem = Rejected("broken_shard", legible(f"{piece.name}: the rest cannot be read: {error}"))
    return Sample(row, legible(name), "", b"", "", "instance", problem)
