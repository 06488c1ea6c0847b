"""Folders of picture files as a source: with a metadata file, or with caption files."""

import csv
import io
import json
import os
import posixpath
import re
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import pyarrow as pa
from pyarrow import fs

from ray_jobs.config import ConfigError
from ray_jobs.data.images import Rejected
from ray_jobs.data.samples import (
    PICTURE_SUFFIXES,
    Listing,
    Piece,
    Role,
    Sample,
    Source,
    Stamp,
    check_caption,
    decode_caption,
    file_stamp,
    fingerprint,
    legible,
)

ROWS_A_PIECE = 128
FIELDS = ("file_name", "text")


class Row(NamedTuple):
    """A picture that a folder lists."""

    file_name: str  # below the folder
    text: str | None = None
    text_file: str | None = None  # that holds the text instead
    stratum: str = ""
    role: Role = "instance"
    is_utf8: bool = True  # else the bytes that the name or the text was read from do not decode


SCHEMA = pa.schema(
    [
        ("file_name", pa.string()),
        ("text", pa.string()),
        ("text_file", pa.string()),
        ("stratum", pa.string()),
        ("role", pa.string()),
        ("is_utf8", pa.bool_()),
    ]
)


@dataclass(frozen=True)
class Rows(Piece):
    """Up to ROWS_A_PIECE pictures. As Arrow they take a third of what Python's strings would."""

    rows: pa.RecordBatch  # of SCHEMA


@dataclass(frozen=True)
class Folder(Source):
    """Pictures that lie below one folder, each a file."""

    filesystem: fs.FileSystem
    folder: str

    def read(self, piece: Piece, wanted: Container[int] | None = None) -> Iterator[Sample]:
        assert isinstance(piece, Rows)
        for number, row in enumerate(piece.rows.to_pylist()):
            if wanted is None or number in wanted:
                yield self._sample(number, Row(**row))

    def _sample(self, number: int, row: Row) -> Sample:
        text, data, problem = "", b"", None
        try:
            text = self._caption(row)
            data = self._read(row.file_name)
        except Rejected as rejected:
            problem = rejected.with_traceback(None)
        return Sample(number, row.file_name, text, data, row.stratum, row.role, problem)

    def _caption(self, row: Row) -> str:
        if not row.is_utf8:
            raise Rejected("caption_not_utf8", "the bytes of the name or of the text are not UTF-8")
        return decode_caption(self._read(row.text_file)) if row.text_file else check_caption(row.text)

    def _read(self, name: str) -> bytes:
        inside = path_inside(name)
        if inside is None:
            raise Rejected("outside_folder", f"{name} leaves the folder")
        try:
            path = f"{self.folder}/{inside}"
            if isinstance(self.filesystem, fs.LocalFileSystem):
                path = _real_path(self.folder, inside)
            with self.filesystem.open_input_file(path) as file:
                return file.read()
        except FileNotFoundError:
            raise Rejected("missing_file", f"no file {name}") from None
        except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
            raise Rejected("unreadable", legible(f"{name}: {error}")) from None


def path_inside(name: str) -> str | None:
    """A path below a folder, without `..`; None if it leaves it, as POSIX or Windows read it."""
    slashed = posixpath.normpath(name.replace("\\", "/"))
    if slashed.startswith("/") or slashed.split("/")[0] == ".." or re.match("[A-Za-z]:/", slashed):
        return None
    return posixpath.normpath(name)


def _real_path(folder: str, inside: str) -> str:
    """A local path with its links followed, so that what is checked is what is opened."""
    root = os.path.realpath(folder)
    path = os.path.realpath(os.path.join(root, inside))
    if os.path.commonpath((root, path)) != root:
        raise Rejected("outside_folder", f"{inside} is a link that leaves the folder")
    # Opening a named pipe would wait for a writer.
    if os.path.exists(path) and not os.path.isfile(path):
        raise Rejected("unreadable", f"{inside} is not a file")
    return path


def open_image_folder(listing: Listing, metadata: str, stratify: str | None) -> Folder:
    """A folder whose `metadata`, metadata.jsonl or metadata.csv, has the columns file_name and text.

    Raises:
        ConfigError: a line cannot be understood, or lacks a field.
    """
    where = f"{listing.name}/{metadata}"
    path, is_csv = f"{listing.folder}/{metadata}", metadata.endswith(".csv")
    with listing.filesystem.open_input_stream(path, compression=None, buffer_size=1 << 20) as stream:
        # Bytes that are not UTF-8 become lone surrogates, which tell the rows that had them.
        lines = io.TextIOWrapper(
            stream, encoding="utf-8-sig", errors="surrogateescape", newline="" if is_csv else "\n"
        )
        numbered = _csv_lines(where, lines) if is_csv else _json_lines(where, lines)
        rows = (_row(f"{where}: line {number}", fields, stratify) for number, fields in numbered)
        source = folder_of_rows(listing, rows, f"{metadata}: rows")
    if not source.pieces:
        raise ConfigError(f"{where}: has no lines; write one a picture")
    return source


def open_caption_files(listing: Listing, stratify: str | None) -> Folder:
    """A folder, with subfolders, of pictures, each with its caption in a .txt of the same name."""
    refuse_stratify(listing, stratify)
    rows = []
    for name in listing.ending(*PICTURE_SUFFIXES):
        text_file = posixpath.splitext(name)[0] + ".txt"
        rows.append(file_row(name, text_file=legible(text_file) if text_file in listing.files else None))
    return folder_of_rows(listing, rows, "pictures")


def folder_of_rows(listing: Listing, rows: Iterable[Row], label: str) -> Folder:
    """Cut `rows` into pieces, which `label` names."""

    def stamp(name: str | None) -> Stamp | None:
        found = listing.files.get(name or "")
        inside = None if found else path_inside(name or "")
        if inside and inside not in listing.files and isinstance(listing.filesystem, fs.LocalFileSystem):
            return file_stamp(f"{listing.folder}/{inside}")  # it lies behind a link, or is missing
        return found or listing.files.get(inside or "")

    remaining, pieces, count = iter(rows), list[Piece](), 0
    while batch := list(islice(remaining, ROWS_A_PIECE)):
        stamps = [(stamp(row.file_name), stamp(row.text_file)) for row in batch]
        digest = fingerprint("folder", listing.folder, [tuple(row) for row in batch], stamps)
        columns = [
            pa.array(column, field.type)
            for column, field in zip(zip(*batch, strict=True), SCHEMA, strict=True)
        ]
        name = f"{label} {count + 1}-{count + len(batch)}"
        pieces.append(Rows(len(pieces), name, digest, pa.record_batch(columns, schema=SCHEMA)))
        count += len(batch)
    return Folder(listing.name, count, pieces, listing.filesystem, listing.folder)


def _json_lines(where: str, lines: Iterable[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigError(
                f"{where}: line {number}: not JSON ({error.msg}); write one object a line"
            ) from None
        if not isinstance(row, dict):
            raise ConfigError(
                f'{where}: line {number}: not an object; write {{"file_name": ..., "text": ...}}'
            )
        yield number, row


def _csv_lines(where: str, lines: Iterable[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    # Strict, since otherwise a quote that is not closed swallows the rest of the file.
    reader = csv.DictReader(lines, strict=True)
    try:
        for row in reader:
            if None in row:
                raise ConfigError(
                    f"{where}: line {reader.line_num}: more values than the header has columns; "
                    "put a text with commas in double quotes"
                )
            yield reader.line_num, row
    except csv.Error as error:
        raise ConfigError(f"{where}: line {reader.line_num}: not CSV ({error}); close every quote") from None


def _row(where: str, fields: dict[str, Any], stratify: str | None) -> Row:
    for field in (*FIELDS, *([stratify] if stratify else [])):
        if field not in fields:
            found = ", ".join(fields) or "nothing"
            fix = "name the fields file_name and text" if field in FIELDS else "mend data.stratify"
            raise ConfigError(legible(f"{where}: field {field!r} is missing (found: {found}); {fix}"))
    file_name, text = (fields[field] for field in FIELDS)
    for field, value in (("file_name", file_name), ("text", "" if text is None else text)):
        if not isinstance(value, str):
            raise ConfigError(f"{where}: field {field!r} must be text, not {value!r}")
    stratum = fields[stratify] if stratify else None
    return Row(
        file_name=legible(file_name),
        text=None if text is None else legible(text),
        stratum="" if stratum is None else legible(str(stratum)),
        is_utf8=file_name + (text or "") == legible(file_name + (text or "")),
    )


def file_row(name: str, **values: Any) -> Row:
    """Of a file that the listing found; a name that is not UTF-8 cannot be asked for again."""
    return Row(legible(name), is_utf8=name == legible(name), **values)


def refuse_stratify(listing: Listing, stratify: str | None) -> None:
    """Raise ConfigError where a source without columns is to be stratified by one."""
    if stratify:
        raise ConfigError(
            f"data.stratify: {stratify}: {listing.name} has no columns, only files; remove it, "
            "or describe the pictures in a metadata.jsonl"
        )
