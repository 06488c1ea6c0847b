"""Parquet files as a source, a picture a row, as Hugging Face datasets write them."""

from collections.abc import Container, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from ray_jobs.config import ConfigError, SourceConfig
from ray_jobs.data.images import Rejected
from ray_jobs.data.samples import (
    Listing,
    Piece,
    Sample,
    Source,
    broken_sample,
    check_caption,
    decode_caption,
    fingerprint,
)

FOOTERS_AT_ONCE = 16  # files that are opened side by side
ROWS_AT_ONCE = 64  # of a row group that are in memory
BUFFER = 4 << 20  # bytes of a column that are asked for at once


@dataclass(frozen=True)
class RowGroup(Piece):
    """A row group of a Parquet file."""

    file: str
    row_group: int  # within the file
    first_row: int  # number within the file of its first row, from 0
    num_rows: int


@dataclass(frozen=True)
class Parquet(Source):
    """Parquet files, a picture a row."""

    filesystem: fs.FileSystem
    folder: str
    image_column: str
    caption_column: str
    stratify: str | None

    def read(self, piece: Piece, wanted: Container[int] | None = None) -> Iterator[Sample]:
        assert isinstance(piece, RowGroup)
        rows = [row for row in range(piece.num_rows) if wanted is None or row in wanted]
        done = 0
        try:
            for batch in self._batches(piece) if rows else ():
                for number in range(batch.num_rows):
                    if wanted is None or done + number in wanted:
                        yield self._sample(piece, done + number, batch.slice(number, 1))
                done += batch.num_rows
                if done > rows[-1]:
                    break
        except (OSError, pa.ArrowException) as error:
            broken = next((row for row in rows if row >= done), None)
            if broken is not None:
                yield broken_sample(piece, broken, f"{piece.file}: row {piece.first_row + broken}", error)

    def _batches(self, piece: RowGroup) -> Iterator[pa.RecordBatch]:
        columns = [self.image_column, self.caption_column, *([self.stratify] if self.stratify else [])]
        with self.filesystem.open_input_file(f"{self.folder}/{piece.file}") as file:
            # A buffer, and none filled ahead: so a column arrives page by page, not as a whole.
            yield from pq.ParquetFile(file, buffer_size=BUFFER, pre_buffer=False).iter_batches(
                ROWS_AT_ONCE, row_groups=[piece.row_group], columns=columns, use_threads=False
            )

    def _sample(self, piece: RowGroup, number: int, row: pa.RecordBatch) -> Sample:
        """From a batch of one row."""
        text, data, problem = "", b"", None
        image = row.column(self.image_column)
        is_struct = pa.types.is_struct(image.type)
        fields = [field.name for field in image.type] if is_struct else []
        path = _as_bytes(image.field("path")) if "path" in fields else None
        name = f"{piece.file}: row {piece.first_row + number}"
        name += f" ({path.decode(errors='replace')})" if path else ""
        stratum = _as_bytes(row.column(self.stratify)) if self.stratify else None
        try:
            caption = _as_bytes(row.column(self.caption_column))
            text = check_caption(None) if caption is None else decode_caption(caption)
            data = (image.field("bytes") if is_struct else image)[0].as_py() or b""
            if not data and path:
                raise Rejected("missing_file", "the row has a path, but not the picture's bytes")
            if not data:
                raise Rejected("empty_file", "the row has no picture")
        except Rejected as rejected:
            problem = rejected.with_traceback(None)
        stratified = (stratum or b"").decode(errors="replace")
        return Sample(number, name, text, data, stratified, "instance", problem)


def _as_bytes(column: pa.Array) -> bytes | None:
    """The first value of a column as UTF-8, or as whatever bytes it holds; None for null."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if not _is_bytes(column.type):
        column = column.cast(pa.string())
    return column.cast(pa.large_binary())[0].as_py()


def _is_binary(kind: pa.DataType) -> bool:
    types = pa.types
    return types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)


def _is_bytes(kind: pa.DataType) -> bool:
    types = pa.types
    is_string = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
    return is_string or _is_binary(kind)


def open_parquet(listing: Listing, files: list[str], config: SourceConfig, stratify: str | None) -> Parquet:
    """Read the footers of `files`.

    Raises:
        ConfigError: a file is damaged or lacks a column.
    """

    def footer(name: str) -> tuple[pq.FileMetaData, pa.Schema]:
        try:
            metadata = pq.read_metadata(f"{listing.folder}/{name}", filesystem=listing.filesystem)
            return metadata, metadata.schema.to_arrow_schema()
        except (OSError, ValueError, pa.ArrowException) as error:  # ValueError: a name is not UTF-8
            raise ConfigError(
                f"{listing.name}: {name}: not a whole Parquet file ({error}); copy it again or remove it"
            ) from None

    columns = (config.image_column, config.caption_column, stratify)
    pieces = list[Piece]()
    num_rows = 0
    with ThreadPoolExecutor(FOOTERS_AT_ONCE) as pool:
        for name, (metadata, schema) in zip(files, pool.map(footer, files), strict=True):
            _check_columns(f"{listing.name}: {name}", schema, config, stratify)
            first_row = 0
            for group in range(metadata.num_row_groups):
                count = metadata.row_group(group).num_rows
                digest = fingerprint(
                    "parquet", listing.folder, name, listing.files[name], group, first_row, count, columns
                )
                label = f"{name}: row group {group}"
                pieces.append(RowGroup(len(pieces), label, digest, name, group, first_row, count))
                first_row += count
            num_rows += first_row
    if not num_rows:
        raise ConfigError(f"{listing.name}: its Parquet files have no rows; add some")
    return Parquet(listing.name, num_rows, pieces, listing.filesystem, listing.folder, *columns)


def _check_columns(where: str, schema: pa.Schema, config: SourceConfig, stratify: str | None) -> None:
    def kind_of(column: str, setting: str) -> pa.DataType:
        if column not in schema.names:
            raise ConfigError(
                f"{where}: has no column {column!r} (found: {', '.join(schema.names)}); mend {setting}"
            )
        kind = schema.field(column).type
        return kind.value_type if pa.types.is_dictionary(kind) else kind

    image = kind_of(config.image_column, "the source's image_column")
    has_bytes = pa.types.is_struct(image) and "bytes" in [field.name for field in image]
    if not _is_binary(image.field("bytes").type if has_bytes else image):
        raise ConfigError(
            f"{where}: column {config.image_column!r} is {image}, not binary or a struct with bytes; "
            "mend the source's image_column"
        )
    caption = kind_of(config.caption_column, "the source's caption_column")
    if not _is_bytes(caption):
        raise ConfigError(
            f"{where}: column {config.caption_column!r} is {caption}, not string; "
            "mend the source's caption_column"
        )
    stratum = kind_of(stratify, "data.stratify") if stratify else pa.string()
    try:
        pa.nulls(0, stratum).cast(pa.string())
    except pa.ArrowNotImplementedError:
        raise ConfigError(
            f"{where}: column {stratify!r} is {stratum}, which has no plain values; mend data.stratify"
        ) from None
