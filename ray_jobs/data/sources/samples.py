"""Interface of a source of captioned pictures: a list of pieces, each of which yields samples.

Nothing here needs Ray. One task reads one piece.
"""

import hashlib
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Container, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, NamedTuple

from ray_jobs.data.sources.captions import AS_WRITTEN, CaptionRules, OptionalCaptions, num_lines
from ray_jobs.pictures.reading import Rejected

Role = Literal["instance", "class"]

# Reasons for pictures and files that are not rows of the dataset. They are counted separately from unusable
# rows: a mask stored with its picture does not count against the dataset.
LEFT_OUT = frozenset({"not_listed", "in_subfolder", "other_member", "unusable_link", "no_picture"})

WITHOUT_CAPTION = frozenset({"missing_caption", "empty_caption"})  # problems that optional captions solve

PLAIN_SUFFIX = re.compile(r"\.[\w.+-]{1,24}|hidden|without a suffix")
OTHER_NAMES = "of other names"
SURROGATE = re.compile(r"[\ud800-\udfff]")


@dataclass(frozen=True)
class Sample:
    """A captioned picture as stored in its source, not decoded; or the reason why there is none."""

    row: int  # number within its piece, from 0
    name: str  # name to locate it by
    text: str  # the caption; "" where `problem` says why, or where captions are optional
    data: bytes  # content of the picture's file; b"" if `problem` is set
    stratum: str  # value of the column named by data.stratify or data.balance, else ""
    role: Role
    problem: Rejected | None  # why it cannot be used, found without decoding the picture
    repaired: bool = False  # True if the caption was repaired: see `captions`
    lines: int = 1  # lines of the caption in its source
    further: tuple[
        bytes, ...
    ] = ()  # contents of the files of its references, its control image, and its mask


@dataclass(frozen=True)
class Piece:
    """Unit read by one task; each kind of source adds the fields that it needs."""

    number: int  # within its source, from 0
    name: str  # for messages
    digest: str  # sha256, hexadecimal; differs if the output of `read` may have changed

    @property
    def has_identities(self) -> bool:
        """Whether its rows can be recognised in another piece."""
        return False

    def identities(self) -> list[bytes]:
        """Return what identifies each row without reading it; other if its sample may have changed."""
        return []


@dataclass(frozen=True)
class LeftOut(Piece):
    """Files of a source that are not rows: the name, the reason (one of LEFT_OUT) and the detail."""

    files: tuple[tuple[str, str, str], ...]

    def samples(self, wanted: Container[int] | None) -> Iterator[Sample]:
        for row, (name, reason, detail) in enumerate(self.files):
            if wanted is None or row in wanted:
                yield left_out(row, name, reason, detail)


@dataclass(frozen=True)
class Source(ABC):
    """Source of captioned pictures. The source and its pieces can be pickled."""

    name: str  # the path as the user wrote it
    num_rows: int | None  # None if known only after reading (tar, Arrow)
    pieces: list[Piece] = field(repr=False)
    notes: tuple[str, ...] = field(default=(), kw_only=True)  # how it is read, for display
    captions: CaptionRules = field(default=AS_WRITTEN, kw_only=True)
    further_columns: tuple[str, ...] = field(default=(), kw_only=True)  # of each sample's `further`

    @cached_property
    def digest(self) -> str:
        """Digest of the caption rules and all pieces, in order."""
        return fingerprint(self.captions, *[piece.digest for piece in self.pieces])

    def reader(self) -> "Source":
        """Return a copy to send to tasks, without the list of pieces, which can be large."""
        return replace(self, pieces=[])

    def read(self, piece: Piece, wanted: Container[int] | None = None) -> Iterator[Sample]:
        """Yield the samples of a piece in order: all, or those whose row is in `wanted`.

        A fault of a sample is stored in its `problem`; no error is raised.
        """
        if isinstance(piece, LeftOut):
            return piece.samples(wanted)
        if self.captions.lines == "each":
            return self._read_lines(piece, wanted)
        return (row for sample in self._read(piece, wanted) for row in self._rows(sample))

    def _read_lines(self, piece: Piece, wanted: Container[int] | None) -> Iterator[Sample]:
        """Read as `read`, for samples with several rows; row numbers require reading all samples before."""
        last, number = last_wanted(wanted), 0
        for sample in self._read(piece, None) if last != -1 else ():
            for row in self._rows(sample):
                if wanted is None or number in wanted:
                    yield replace(row, row=number)
                number += 1
            if last is not None and number > last:
                return

    def _rows(self, sample: Sample) -> list[Sample]:
        """Return the rows of a sample, according to the caption rules."""
        if sample.problem:
            return [sample]
        texts = self.captions.texts(sample.text)
        if not texts:
            empty = Rejected("empty_caption", "the text is empty")
            return [replace(sample, text="", data=b"", further=(), problem=empty)]
        names = [f"{sample.name}: line {number}" for number in range(1, len(texts) + 1)]
        return [
            replace(
                sample,
                name=name if len(texts) > 1 else sample.name,
                text=text,
                repaired=repaired,
                lines=num_lines(sample.text),
            )
            for name, (text, repaired) in zip(names, texts, strict=True)
        ]

    @property
    def optional(self) -> bool:
        """Whether a picture without a caption is a row."""
        return isinstance(self.captions, OptionalCaptions)

    def _caption_or_none(self, read: Callable[[], str]) -> str:
        """Return the caption that `read` returns; "" if there is none and it is optional."""
        try:
            return read()
        except Rejected as rejected:
            if self.optional and rejected.reason in WITHOUT_CAPTION:
                return ""
            raise

    @abstractmethod
    def _read(self, piece: Piece, wanted: Container[int] | None) -> Iterator[Sample]:
        """Read a piece of this kind of source, as `read` specifies."""


def last_wanted(wanted: Container[int] | None) -> int | None:
    """Last row to read; -1 if none is wanted, None if all may be."""
    return max(wanted, default=-1) if isinstance(wanted, Collection) else None


def fingerprint(*parts: object) -> str:
    """SHA-256 of plain values, in hexadecimal."""
    return fingerprint_of(repr(parts))


def fingerprint_of(text: str) -> str:
    """SHA-256 of the representation of plain values, in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def legible(text: str) -> str:
    """Make text storable as UTF-8 by replacing lone surrogates, which stand for undecodable bytes."""
    return text if text.isascii() else SURROGATE.sub("\N{REPLACEMENT CHARACTER}", text)


def check_caption(text: str | None) -> str:
    """Return `text` stripped, if it can be a caption; raise Rejected otherwise."""
    if text is None:
        raise Rejected("missing_caption", "the caption is missing")
    if not text.strip():
        raise Rejected("empty_caption", "the text is empty")
    return text.strip()


def decode_caption(data: bytes) -> str:
    """Decode the caption in a text file or binary column; raise Rejected if there is none."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Rejected("caption_not_utf8", f"byte {error.start} of the text is not UTF-8") from None
    return check_caption(text)


def broken_sample(piece: Piece, row: int, name: str, error: Exception) -> Sample:
    """Sample that represents the rest of a piece that cannot be read from `row`."""
    problem = Rejected("broken_shard", legible(f"{piece.name}: the rest cannot be read: {error}"))
    return Sample(row, legible(name), "", b"", "", "instance", problem)


def left_out(row: int, name: str, reason: str, detail: str) -> Sample:
    """Sample that represents a file that is not a row; `reason` is one of LEFT_OUT."""
    assert reason in LEFT_OUT
    return Sample(row, legible(name), "", b"", "", "instance", Rejected(reason, legible(detail)))


ELEMENT = re.compile(r"(.+)\[(\d{1,3})\]")  # of a list in a column: `references[0]`


class Element(NamedTuple):
    """The place of a further picture: a column, or an element of a column of lists, counted from 0."""

    column: str
    place: int | None

    @staticmethod
    def of(name: str, columns: Container[str]) -> "Element":
        """Return the element that a name in `reference_columns` stands for.

        Args:
            columns: those that there are; a column of the whole name comes first.
        """
        found = None if name in columns else ELEMENT.fullmatch(name)
        return Element(found[1], int(found[2])) if found else Element(name, None)


def incomplete(column: str, detail: str) -> Rejected:
    """Return the error for a row without one of its further pictures."""
    return Rejected("incomplete", legible(f"{column}: {detail}"))


def no_pictures(row: int, name: str, suffixes: Counter[str]) -> Sample:
    """Sample that represents all files of one location that are not pictures, counted by suffix."""
    return left_out(row, name, "no_picture", suffix_text(suffixes))


def suffix_text(suffixes: Counter[str]) -> str:
    """Format counts by suffix, the most frequent first: `3 .json, 1 .md`.

    A name with unusual characters after its last dot counts as having no suffix.
    """
    told = Counter[str]()
    for suffix, count in suffixes.items():
        told[suffix if PLAIN_SUFFIX.fullmatch(suffix) else OTHER_NAMES] += count
    ordered = sorted(told.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count:,} {suffix}" for suffix, count in ordered)


def read_suffix_text(text: str) -> Counter[str]:
    """Inverse of `suffix_text`."""
    pairs = (part.split(" ", 1) for part in text.split(", "))
    return Counter({suffix: int(count.replace(",", "")) for count, suffix in pairs})
