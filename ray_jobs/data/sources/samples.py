"""What a source of captioned pictures is: a list of pieces, of which each yields samples.

Nothing here needs Ray. A piece is what one task reads.
"""

import hashlib
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Container, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

from ray_jobs.data.sources.captions import AS_WRITTEN, CaptionRules, num_lines
from ray_jobs.pictures.reading import Rejected

Role = Literal["instance", "class"]

# Reasons of pictures and files that belong to no row of the set. They are counted apart from the rows that
# cannot be used: a mask beside its picture does not speak against the set.
LEFT_OUT = frozenset({"not_listed", "in_subfolder", "other_member", "unusable_link", "no_picture"})

PLAIN_SUFFIX = re.compile(r"\.[\w.+-]{1,24}|hidden|without a suffix")
OTHER_NAMES = "of other names"


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
    repaired: bool = False  # the caption: see `captions`
    lines: int = 1  # of the caption in its source


@dataclass(frozen=True)
class Piece:
    """What one task reads; the kinds of sources add what their reading needs."""

    number: int  # within its source, from 0
    name: str  # for messages
    digest: str  # sha256, hexadecimal: another one where what `read` yields can have changed


@dataclass(frozen=True)
class LeftOut(Piece):
    """Files of a source that are no rows of it: the name, the reason (one of LEFT_OUT) and the detail."""

    files: tuple[tuple[str, str, str], ...]

    def samples(self, wanted: Container[int] | None) -> Iterator[Sample]:
        for row, (name, reason, detail) in enumerate(self.files):
            if wanted is None or row in wanted:
                yield left_out(row, name, reason, detail)


@dataclass(frozen=True)
class Source(ABC):
    """A place with captioned pictures. It can be pickled, and so can its pieces."""

    name: str  # the path as the user wrote it
    num_rows: int | None  # None where only reading tells (tar, Arrow)
    pieces: list[Piece] = field(repr=False)
    notes: tuple[str, ...] = field(default=(), kw_only=True)  # on how it is read, for a person
    captions: CaptionRules = field(default=AS_WRITTEN, kw_only=True)

    @cached_property
    def digest(self) -> str:
        """Of all pieces, in their order."""
        return fingerprint(self.captions, *[piece.digest for piece in self.pieces])

    def reader(self) -> "Source":
        """A copy to send to tasks: it lists no pieces (they can be large) and reads those it is given."""
        return replace(self, pieces=[])

    def read(self, piece: Piece, wanted: Container[int] | None = None) -> Iterator[Sample]:
        """The samples of a piece in order: all, or those whose row is in `wanted`.

        What is wrong with a sample is its `problem`; nothing is raised for it.
        """
        if isinstance(piece, LeftOut):
            return piece.samples(wanted)
        if self.captions.lines == "each":
            return self._read_lines(piece, wanted)
        return (row for sample in self._read(piece, wanted) for row in self._rows(sample))

    def _read_lines(self, piece: Piece, wanted: Container[int] | None) -> Iterator[Sample]:
        """As `read`, where a sample may be several rows; which it is, only reading all before it tells."""
        last, number = last_wanted(wanted), 0
        for sample in self._read(piece, None) if last != -1 else ():
            for row in self._rows(sample):
                if wanted is None or number in wanted:
                    yield replace(row, row=number)
                number += 1
            if last is not None and number > last:
                return

    def _rows(self, sample: Sample) -> list[Sample]:
        """The rows that a sample gives, by the rules for captions."""
        if sample.problem:
            return [sample]
        texts = self.captions.texts(sample.text)
        if not texts:
            return [
                replace(sample, text="", data=b"", problem=Rejected("empty_caption", "the text is empty"))
            ]
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

    @abstractmethod
    def _read(self, piece: Piece, wanted: Container[int] | None) -> Iterator[Sample]:
        """As `read`, of a piece of this kind of source."""


def last_wanted(wanted: Container[int] | None) -> int | None:
    """The row behind which nothing is read; -1 where none is wanted, None where all may be."""
    return max(wanted, default=-1) if isinstance(wanted, Collection) else None


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


def left_out(row: int, name: str, reason: str, detail: str) -> Sample:
    """Stand for a file that is no row of the set; `reason` is one of LEFT_OUT."""
    assert reason in LEFT_OUT
    return Sample(row, legible(name), "", b"", "", "instance", Rejected(reason, legible(detail)))


def no_pictures(row: int, name: str, suffixes: Counter[str]) -> Sample:
    """Stand for all files of one place that are no pictures, counted by suffix."""
    return left_out(row, name, "no_picture", suffix_text(suffixes))


def suffix_text(suffixes: Counter[str]) -> str:
    """`3 .json, 1 .md`; the most frequent first. A name with odd characters behind its last dot has no suffix
    that a person would call one."""
    told = Counter[str]()
    for suffix, count in suffixes.items():
        told[suffix if PLAIN_SUFFIX.fullmatch(suffix) else OTHER_NAMES] += count
    ordered = sorted(told.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count:,} {suffix}" for suffix, count in ordered)


def read_suffix_text(text: str) -> Counter[str]:
    """Inverse of `suffix_text`."""
    pairs = (part.split(" ", 1) for part in text.split(", "))
    return Counter({suffix: int(count.replace(",", "")) for count, suffix in pairs})
