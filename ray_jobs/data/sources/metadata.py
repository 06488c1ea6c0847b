"""Metadata files as a source: metadata.jsonl, .csv or .parquet, with one line per picture.

As in an ImageFolder of the datasets library, every folder may have one; its file names are relative to it.
"""

import csv
import io
import json
import posixpath
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ray_jobs.config import ConfigError, SourceConfig
from ray_jobs.data.sources.folders import Folder, Row, folder_of_rows
from ray_jobs.data.sources.listing import Listing
from ray_jobs.data.sources.samples import Element, legible
from ray_jobs.data.sources.tables import CAPTION_COLUMNS, caption_column

METADATA_FILES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
PREFERENCES = ("preferences.jsonl", "preferences.parquet")  # read where an image column of theirs is named
CHOSEN, REJECTED = "chosen_image", "rejected_image"
FILE_COLUMN = "file_name"
ROWS_AT_ONCE = 1024  # rows of a metadata.parquet per batch


def metadata_files(listing: Listing, image_column: str | None) -> list[str]:
    """List the metadata files of all folders. A metadata.parquet without file names is an ordinary table.

    Raises:
        ConfigError: a folder has two metadata files.
    """
    names, folders = [], dict[str, str]()
    files = PREFERENCES if image_column in (CHOSEN, REJECTED) else METADATA_FILES
    found = [(*posixpath.split(name), name) for name in listing.ending(*files)]
    known = [each for each in found if each[1] in files]
    for folder, file, name in sorted(known, key=lambda each: (each[0], files.index(each[1]))):
        if file.endswith(".parquet") and not _has_column(listing, name, image_column or FILE_COLUMN):
            continue
        if folder in folders:
            raise ConfigError(f"{listing.name}: has {folders[folder]} and {name}; remove one of them")
        folders[folder] = name
        names.append(name)
    return names


def _has_column(listing: Listing, name: str, column: str) -> bool:
    try:
        schema = pq.read_schema(f"{listing.folder}/{name}", filesystem=listing.filesystem)
    except (OSError, pa.ArrowException):
        return False  # rejected later as a damaged table
    if column not in schema.names:
        return False
    kind = schema.field(column).type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_dictionary(kind)


def open_image_folder(
    listing: Listing,
    files: Sequence[str],
    config: SourceConfig,
    stratify: str | None,
    optional: bool = False,
) -> Folder:
    """Open the pictures named by metadata files.

    Args:
        files: result of `metadata_files`.
        optional: captions are optional.

    Raises:
        ConfigError: a line cannot be parsed, or lacks a field.
    """
    rows = (row for file in files for row in _rows(listing, file, config, stratify, optional))
    source = folder_of_rows(listing, rows, f"{files[0]}: rows" if len(files) == 1 else "metadata rows")
    if not source.pieces:
        raise ConfigError(f"{listing.name}/{files[0]}: has no lines; write one per picture")
    return replace(source, described_by=tuple(files), further_columns=tuple(config.further_columns))


def _rows(
    listing: Listing, file: str, config: SourceConfig, stratify: str | None, optional: bool
) -> Iterator[Row]:
    where, folder = f"{listing.name}/{file}", posixpath.dirname(file)
    caption, never = config.caption_column, list(config.further_columns)
    fields: Fields = {}
    for number, fields in _lines(listing, file, where):
        if optional and config.caption_column is None:
            caption = caption_column(fields)
            fields.setdefault(caption, None)
        elif caption is None:  # the first line decides for all
            caption = caption_column(fields)
        columns = (config.image_column or FILE_COLUMN, caption)
        line = f"{where}: line {number}"
        row = _row(line, fields, columns, stratify)
        if config.further_columns:
            named = _further(line, fields, config.further_columns)
            never = [column for column in never if Element.of(column, fields).column not in fields]
            legibly = row.is_utf8 and all(name == legible(name) for name in named)
            row = row._replace(further=named, is_utf8=legibly)
        if folder:
            inside = tuple(f"{folder}/{name}" if name else "" for name in row.further)
            row = row._replace(file_name=f"{folder}/{row.file_name}", further=inside)
        yield row
    if never and fields:
        raise ConfigError(
            legible(
                f"{where}: no line has a field {never[0]!r} (the last has {', '.join(fields)}); correct the "
                "source's reference_columns, control_column or mask_column"
            )
        )


Fields = dict[str, Any]  # of one line, by name


def _lines(listing: Listing, file: str, where: str) -> Iterator[tuple[int, Fields]]:
    path = f"{listing.folder}/{file}"
    if file.endswith(".parquet"):
        with listing.filesystem.open_input_file(path) as opened:
            batches = pq.ParquetFile(opened).iter_batches(ROWS_AT_ONCE)
            yield from enumerate((row for batch in batches for row in batch.to_pylist()), 1)
        return
    is_csv = file.endswith(".csv")
    with listing.filesystem.open_input_stream(path, compression=None, buffer_size=1 << 20) as stream:
        # Bytes that are not UTF-8 become lone surrogates, which mark their rows.
        lines = io.TextIOWrapper(
            stream, encoding="utf-8-sig", errors="surrogateescape", newline="" if is_csv else "\n"
        )
        yield from _csv_lines(where, lines) if is_csv else _json_lines(where, lines)


def _json_lines(where: str, lines: Iterable[str]) -> Iterator[tuple[int, Fields]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigError(
                f"{where}: line {number}: not JSON ({error.msg}); write one object per line"
            ) from None
        if not isinstance(row, dict):
            raise ConfigError(
                f'{where}: line {number}: not an object; write {{"file_name": ..., "text": ...}}'
            )
        yield number, row


def _csv_lines(where: str, lines: Iterable[str]) -> Iterator[tuple[int, Fields]]:
    # Strict, since otherwise an unclosed quote swallows the rest of the file.
    reader = csv.DictReader(lines, strict=True)
    try:
        for row in reader:
            if None in row:
                raise ConfigError(
                    f"{where}: line {reader.line_num}: more values than the header has columns; "
                    "put texts with commas in double quotes"
                )
            yield reader.line_num, row
    except csv.Error as error:
        raise ConfigError(
            f"{where}: line {reader.line_num}: not CSV ({error}); check that every quote is closed"
        ) from None


def _further(where: str, fields: Fields, columns: Sequence[str]) -> tuple[str, ...]:
    """Return the files of a line's further pictures, "" where one is missing."""
    found = []
    for column in columns:
        name, place = Element.of(column, fields)
        value = fields.get(name)
        if place is not None and value is not None:
            if not isinstance(value, list):
                raise ConfigError(f"{where}: field {name!r} must be a list of file names, not {value!r}")
            value = value[place] if place < len(value) else None
        if isinstance(value, list):
            raise ConfigError(
                f"{where}: field {name!r} is a list; name its elements in the source's reference_columns: "
                f"{name}[0], {name}[1], ..."
            )
        if value is not None and not isinstance(value, str):
            raise ConfigError(f"{where}: field {column!r} must be a file name, not {value!r}")
        found.append(value or "")
    return tuple(found)


def _row(where: str, fields: Fields, columns: tuple[str, str], stratify: str | None) -> Row:
    """Build a row from a line's fields; `columns` names those of the file name and the caption."""
    for field in (*columns, *([stratify] if stratify else [])):
        if field not in fields:
            fixes = dict(zip(columns, ("image_column", "caption_column"), strict=True))
            found = ", ".join(fields) or "nothing"
            fix = "correct data.stratify or data.balance"
            if field in fixes:
                named = f"{FILE_COLUMN} and {CAPTION_COLUMNS[0]}"
                fix = f"name the fields {named}, or set {fixes[field]}"
            raise ConfigError(legible(f"{where}: field {field!r} is missing (found: {found}); {fix}"))
    file_name, text = (fields[field] for field in columns)
    for field, value in ((columns[0], file_name), (columns[1], "" if text is None else text)):
        if not isinstance(value, str):
            raise ConfigError(
                f"{where}: field {field!r} must be a text, not {value!r}; put it in double quotes"
            )
    stratum = fields[stratify] if stratify else None
    name, caption = legible(file_name), None if text is None else legible(text)
    return Row(
        file_name=name,
        text=caption,
        stratum="" if stratum is None else legible(str(stratum)),
        is_utf8=(name, caption) == (file_name, text),
    )
