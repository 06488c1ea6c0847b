"""Folders of picture files as a source, including those with captions in separate text files."""

import hashlib
import os
import posixpath
import re
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import NamedTuple

import pyarrow as pa
from pyarrow import fs

from ray_jobs.config import ConfigError, SourceConfig
from ray_jobs.data.sources.listing import PICTURE_SUFFIXES, TEXT_SUFFIX, Listing, Stamp, file_stamp
from ray_jobs.data.sources.samples import (
    Piece,
    Role,
    Sample,
    Source,
    check_caption,
    decode_caption,
    fingerprint_of,
    incomplete,
    legible,
)
from ray_jobs.data.sources.set_down import Batch, BatchFile
from ray_jobs.pictures.reading import Rejected

ROWS_A_PIECE = 128


class Row(NamedTuple):
    """A picture listed by a folder."""

    file_name: str  # below the folder
    text: str | None = None
    text_file: str | None = None  # file that holds the text instead
    stratum: str = ""
    role: Role = "instance"
    is_utf8: bool = True  # False if the bytes of the name or text do not decode
    further: tuple[str, ...] = ()  # files of its further pictures; "" where one is missing


SCHEMA = pa.schema(
    [
        ("file_name", pa.string()),
        ("text", pa.string()),
        ("text_file", pa.string()),
        ("stratum", pa.string()),
        ("role", pa.string()),
        ("is_utf8", pa.bool_()),
        ("further", pa.list_(pa.string())),
    ]
)

IDENTIFIED = SCHEMA.append(pa.field("identity", pa.binary(16)))


@dataclass(frozen=True)
class Rows(Piece):
    """Up to ROWS_A_PIECE pictures, as Arrow data."""

    batch: Batch  # with SCHEMA, and the identity of each row

    @property
    def rows(self) -> pa.RecordBatch:
        return self.batch.read().select(SCHEMA.names)

    @property
    def has_identities(self) -> bool:
        return True

    def identities(self) -> list[bytes]:
        found: list[bytes] = self.batch.read()["identity"].to_pylist()
        return found


@dataclass(frozen=True)
class Folder(Source):
    """Pictures below one folder, one file each.

    Attributes:
        described_by: files that list the pictures with their captions, if there are any.
    """

    filesystem: fs.FileSystem
    folder: str
    described_by: tuple[str, ...] = field(default=(), kw_only=True)

    def listed(self, listing: Listing) -> set[str]:
        """Files of the folder, or below links in it, that the rows name: paths relative to the folder."""
        linked = tuple(f"{name}/" for name in listing.links)
        found = set[str]()
        for piece in self.pieces:
            assert isinstance(piece, Rows)
            rows = piece.rows
            names = [*rows["file_name"].to_pylist(), *rows["text_file"].to_pylist()]
            names += [name for further in rows["further"].to_pylist() for name in further]
            for name in filter(None, names):
                inside = name if name in listing.files else path_inside(name) or ""
                if inside in listing.files or inside in listing.links or inside.startswith(linked):
                    found.add(inside)
        return found

    def captions_of(self, piece: "Rows") -> list[tuple[Row, str]]:
        """Rows of a piece with their captions, "" where there is none, without reading the pictures."""
        return [
            (row, self._caption_or_empty(row)) for row in (Row(**each) for each in piece.rows.to_pylist())
        ]

    def _caption_or_empty(self, row: Row) -> str:
        try:
            return self._caption(row)
        except Rejected:
            return ""

    def _read(self, piece: Piece, wanted: Container[int] | None) -> Iterator[Sample]:
        assert isinstance(piece, Rows)
        for number, row in enumerate(piece.rows.to_pylist()):
            if wanted is None or number in wanted:
                yield self._sample(number, Row(**row))

    def _sample(self, number: int, row: Row) -> Sample:
        text, data, further, problem = "", b"", tuple[bytes, ...](), None
        try:
            text = self._caption_or_none(lambda: self._caption(row))
            data = self._bytes(row.file_name)
            further = tuple(map(self._further_picture, self.further_columns, row.further))
        except Rejected as rejected:
            data, problem = b"", rejected.with_traceback(None)
        return Sample(number, row.file_name, text, data, row.stratum, row.role, problem, further=further)

    def _further_picture(self, column: str, name: str) -> bytes:
        if not name:
            raise incomplete(column, "none is named, or there is no picture of the same name")
        try:
            return self._bytes(name)
        except Rejected as rejected:
            raise incomplete(column, rejected.detail) from None

    def _caption(self, row: Row) -> str:
        if not row.is_utf8:
            raise Rejected("caption_not_utf8", "the file name or the caption is not UTF-8")
        return decode_caption(self._bytes(row.text_file)) if row.text_file else check_caption(row.text)

    def _bytes(self, name: str) -> bytes:
        inside = path_inside(name)
        if inside is None:
            raise Rejected("outside_folder", f"{name} points outside the folder")
        try:
            path = f"{self.folder}/{inside}"
            if isinstance(self.filesystem, fs.LocalFileSystem):
                path = _real_path(self.folder, inside)
            with self.filesystem.open_input_file(path) as file:
                return file.read()
        except FileNotFoundError:
            raise Rejected("missing_file", f"no file {name}") from None
        except (OSError, ValueError) as error:  # ValueError: a name with a null byte
            raise Rejected("unreadable", legible(f"{name}: {error}")) from None


def path_inside(name: str) -> str | None:
    """Normalise a path below a folder; None if it leaves the folder, by POSIX or Windows rules."""
    slashed = posixpath.normpath(name.replace("\\", "/"))
    if slashed.startswith("/") or slashed.split("/")[0] == ".." or re.match("[A-Za-z]:/", slashed):
        return None
    return posixpath.normpath(name) if "\\" in name else slashed


def _real_path(folder: str, inside: str) -> str:
    """Resolve the links of a local path, so that the checked path is the one that is opened."""
    root = os.path.realpath(folder)
    path = os.path.realpath(os.path.join(root, inside))
    if os.path.commonpath((root, path)) != root:
        raise Rejected("outside_folder", f"{inside} is a link that points outside the folder")
    # Opening a named pipe would block until there is a writer.
    if os.path.exists(path) and not os.path.isfile(path):
        raise Rejected("unreadable", f"{inside} is not a file")
    return path


def open_caption_files(
    listing: Listing, captions: dict[str, str], config: SourceConfig, stratify: str | None
) -> Folder:
    """Open a folder, with subfolders, of pictures whose captions are in .txt files of the same name.

    Args:
        captions: result of `caption_files`.
    """
    refuse_columns(listing, config, stratify)
    columns = tuple(config.further_columns)
    for column in columns:
        if not any(name.startswith(f"{column}/") for name in listing.pictures()):
            raise ConfigError(
                f"{listing.name}: has no pictures in {column}/, which reference_columns, control_column or "
                "mask_column names; put the others there, under the names of the pictures, or correct it"
            )
    stems = {posixpath.splitext(name)[0]: name for name in reversed(listing.pictures())}
    rows = []
    for name in listing.pictures():
        if any(name.startswith(f"{column}/") for column in columns):
            continue
        stem = posixpath.splitext(name)[0]
        text_file = captions.get(stem)
        row = file_row(name, text_file=legible(text_file) if text_file else None)
        found = [legible(stems.get(f"{column}/{stem}", "")) for column in columns]
        rows.append(row._replace(further=tuple(found)))
    return replace(folder_of_rows(listing, rows, "pictures"), further_columns=columns)


def caption_files(listing: Listing) -> dict[str, str]:
    """Find the caption files of pictures, by path without the suffix.

    Suffixes may be in upper case, as for pictures; if both cases exist, `.txt` is used.
    """
    texts = {posixpath.splitext(name)[0]: name for name in reversed(listing.ending(TEXT_SUFFIX))}
    texts |= {posixpath.splitext(name)[0]: name for name in listing.files if name.endswith(TEXT_SUFFIX)}
    stems = {posixpath.splitext(name)[0] for name in listing.ending(*PICTURE_SUFFIXES)}
    return {stem: text for stem, text in texts.items() if stem in stems}


def folder_of_rows(listing: Listing, rows: Iterable[Row], label: str) -> Folder:
    """Divide `rows` into pieces, named after `label`."""

    def stamp(name: str | None) -> Stamp | None:
        if not name:
            return None
        found = listing.files.get(name)
        inside = None if found else path_inside(name)
        if inside and inside not in listing.files and isinstance(listing.filesystem, fs.LocalFileSystem):
            return file_stamp(f"{listing.folder}/{inside}")  # behind a link, or missing
        return found or listing.files.get(inside or "")

    start = f"'folder', {listing.folder!r}"
    remaining, pieces, count, file = iter(rows), list[Piece](), 0, BatchFile(IDENTIFIED)
    while batch := list(islice(remaining, ROWS_A_PIECE)):
        stamps = [
            repr((stamp(row.file_name), stamp(row.text_file), *map(stamp, row.further))) for row in batch
        ]
        # As in releases without further pictures, where there are none.
        told = [repr(tuple(row) if row.further else tuple(row)[:-1]) for row in batch]
        digest = fingerprint_of(f"({start}, [{', '.join(told)}], [{', '.join(stamps)}])")
        identities = [
            hashlib.sha256(f"{start}{row}{files}".encode()).digest()[:16]
            for row, files in zip(told, stamps, strict=True)
        ]
        columns = [
            pa.array(column, field.type)
            for column, field in zip([*zip(*batch, strict=True), identities], IDENTIFIED, strict=True)
        ]
        name = f"{label} {count + 1}-{count + len(batch)}"
        pieces.append(
            Rows(len(pieces), name, digest, file.set_down(pa.record_batch(columns, schema=IDENTIFIED)))
        )
        count += len(batch)
    return Folder(listing.name, count, pieces, listing.filesystem, listing.folder)


def file_row(
    name: str, *, text: str | None = None, text_file: str | None = None, role: Role = "instance"
) -> Row:
    """Row of a listed file; a name that is not UTF-8 cannot be opened later."""
    return Row(legible(name), text=text, text_file=text_file, role=role, is_utf8=name == legible(name))


def refuse_columns(listing: Listing, config: SourceConfig, stratify: str | None) -> None:
    """Raise ConfigError if a setting names a column, but the source has no columns."""
    named = {
        "data.stratify or data.balance": stratify,
        "caption_column": config.caption_column,
        "image_column": config.image_column,
    }
    for setting, column in named.items():
        if column:
            raise ConfigError(
                f"{setting}: {column}: {listing.name} has only files, no columns; remove this "
                "setting, or describe the pictures in a metadata.jsonl"
            )
