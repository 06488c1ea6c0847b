"""Parquet files as a source, one picture per row, as written by the datasets library and img2dataset."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from ray_jobs.config import ConfigError, SourceConfig
from ray_jobs.data.sources.listing import Listing
from ray_jobs.data.sources.samples import Piece, fingerprint
from ray_jobs.data.sources.tables import Table, find_columns, picture_columns

FOOTERS_AT_ONCE = 16  # files opened in parallel
ROWS_AT_ONCE = 64  # rows of a row group in memory
BUFFER = 4 << 20  # bytes of a column per read


@dataclass(frozen=True)
class RowGroup(Piece):
    """A row group of a Parquet file."""

    file: str
    row_group: int  # within the file
    first_row: int  # number within the file of its first row, from 0
    num_rows: int


@dataclass(frozen=True)
class Parquet(Table):
    """Parquet files, one picture per row."""

    def _batches(self, piece: Piece) -> Iterator[pa.RecordBatch]:
        assert isinstance(piece, RowGroup)
        with self.filesystem.open_input_file(f"{self.folder}/{piece.file}") as file:
            # With a buffer and no prefetch, a column is read page by page, not as a whole.
            yield from pq.ParquetFile(file, buffer_size=BUFFER, pre_buffer=False).iter_batches(
                ROWS_AT_ONCE, row_groups=[piece.row_group], columns=self.columns.names, use_threads=False
            )

    def _place(self, piece: Piece, row: int) -> str:
        assert isinstance(piece, RowGroup)
        return f"{piece.file}: row {piece.first_row + row}"


@dataclass(frozen=True)
class Footer:
    """Footer of a Parquet file; or the error, if it cannot be read."""

    file: str
    rows: tuple[int, ...]  # number of rows per row group
    schema: pa.Schema
    error: str = ""

    def has_pictures(self, image_column: str | None) -> bool:
        """Return whether the file can be a source. A damaged one can, so that it is not ignored."""
        named = image_column is not None and image_column in self.schema.names
        return bool(self.error or named or picture_columns(self.schema))


def read_footers(listing: Listing, files: Sequence[str]) -> list[Footer]:
    """Read the footers of Parquet files, in order."""

    def footer(name: str) -> Footer:
        try:
            metadata = pq.read_metadata(f"{listing.folder}/{name}", filesystem=listing.filesystem)
            rows = tuple(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))
            return Footer(name, rows, metadata.schema.to_arrow_schema())
        except (OSError, ValueError, pa.ArrowException) as error:  # ValueError: a name is not UTF-8
            return Footer(name, (), pa.schema([]), str(error) or type(error).__name__)

    with ThreadPoolExecutor(FOOTERS_AT_ONCE) as pool:
        return list(pool.map(footer, files))


def open_parquet(
    listing: Listing,
    footers: Sequence[Footer],
    config: SourceConfig,
    stratify: str | None,
    optional: bool = False,
) -> Parquet:
    """List the row groups of Parquet files.

    Raises:
        ConfigError: a file is damaged, lacks a column, or has other columns than the first one.
    """
    pieces, columns = list[Piece](), None
    for footer in footers:
        where = f"{listing.name}: {footer.file}"
        if footer.error:
            raise ConfigError(
                f"{where}: not a complete Parquet file ({footer.error}); copy it again or remove it"
            )
        found = find_columns(where, footer.schema, config, stratify, optional)
        if columns and found != columns:
            raise ConfigError(
                f"{where}: pictures and captions are in {found.image!r} and {found.caption!r}, elsewhere in "
                f"{columns.image!r} and {columns.caption!r}; name image_column and caption_column"
            )
        columns, first_row = found, 0
        for group, count in enumerate(footer.rows):
            digest = fingerprint(
                "parquet",
                listing.folder,
                footer.file,
                listing.files[footer.file],
                group,
                first_row,
                count,
                found.identity,
            )
            label = f"{footer.file}: row group {group}"
            pieces.append(RowGroup(len(pieces), label, digest, footer.file, group, first_row, count))
            first_row += count
    num_rows = sum(sum(footer.rows) for footer in footers)
    if not num_rows or columns is None:
        raise ConfigError(f"{listing.name}: its Parquet files have no rows; add some")
    place = listing.filesystem, listing.folder
    return Parquet(listing.name, num_rows, pieces, *place, columns, further_columns=columns.further)
