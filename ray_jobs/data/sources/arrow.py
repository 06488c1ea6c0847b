"""Arrow files as a source, one picture per row, as written by `save_to_disk` of the datasets library (5.2).

Such a folder holds `data-00000-of-00002.arrow` and so on (streams in Arrow's IPC format), a `state.json` that
lists them, and a `dataset_info.json`. A DatasetDict is a folder of such folders and a `dataset_dict.json`.
"""

import json
import posixpath
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa
from pyarrow import fs

from ray_jobs.config import ConfigError, SourceConfig
from ray_jobs.data.sources.listing import Listing
from ray_jobs.data.sources.samples import Piece, fingerprint
from ray_jobs.data.sources.tables import Table, find_columns

STATE_FILE = "state.json"
DICT_FILE = "dataset_dict.json"
CACHE = "cache-"  # prefix of files left by the library's `map` and `filter`: other states of the same rows
FILE_FORMAT = b"ARROW1"  # first bytes of a file in the IPC format that is not a stream


@dataclass(frozen=True)
class ArrowFile(Piece):
    """A file of record batches."""

    file: str


@dataclass(frozen=True)
class Arrow(Table):
    """Arrow IPC files, one picture per row."""

    def _batches(self, piece: Piece) -> Iterator[pa.RecordBatch]:
        assert isinstance(piece, ArrowFile)
        with _opened(self.filesystem, f"{self.folder}/{piece.file}") as file:
            for batch in _record_batches(file):
                chosen = batch.select(self.columns.names)
                chosen.validate(full=True)  # damaged offsets would be followed wherever they lead
                yield chosen

    def _place(self, piece: Piece, row: int) -> str:
        return f"{piece.name}: row {row}"


def _opened(filesystem: fs.FileSystem, path: str) -> pa.NativeFile:
    """Open a file; a local one is memory-mapped, so that only the accessed part of a batch is loaded."""
    if isinstance(filesystem, fs.LocalFileSystem):
        return pa.memory_map(path)
    return filesystem.open_input_file(path)


def _reader(file: pa.NativeFile) -> pa.RecordBatchFileReader | pa.RecordBatchStreamReader:
    """Return Arrow's reader for the stream or the file variant of its IPC format."""
    begins = file.read(len(FILE_FORMAT))
    file.seek(0)
    return pa.ipc.open_file(file) if begins == FILE_FORMAT else pa.ipc.open_stream(file)


def _record_batches(file: pa.NativeFile) -> Iterator[pa.RecordBatch]:
    reader = _reader(file)
    if isinstance(reader, pa.RecordBatchFileReader):
        return (reader.get_batch(number) for number in range(reader.num_record_batches))
    return iter(reader)


def _schema(listing: Listing, name: str) -> pa.Schema:
    try:
        with _opened(listing.filesystem, f"{listing.folder}/{name}") as file:
            return _reader(file).schema
    except (OSError, ValueError, pa.ArrowException) as error:
        raise ConfigError(
            f"{listing.name}: {name}: not a complete Arrow file ({error}); copy it again or remove it"
        ) from None


def arrow_files(listing: Listing) -> list[str]:
    """List the Arrow files that hold rows: those in the `state.json` of their folder; without one, all.

    The library's cache files are ignored.

    Raises:
        ConfigError: a `state.json` is broken, or lists a missing file.
    """
    listed: dict[str, list[str]] = {}
    for name in listing.ending(STATE_FILE):
        if posixpath.basename(name) != STATE_FILE:
            continue
        folder, files = posixpath.dirname(name), _listed(listing, name)
        if files is None:
            continue
        listed[folder] = [posixpath.join(folder, file) for file in files]
        for file in listed[folder]:
            if file not in listing.files:
                raise ConfigError(
                    f"{listing.name}: {name}: lists {file}, which is missing; copy the folder again"
                )
    others = [
        name
        for name in listing.ending(".arrow")
        if posixpath.dirname(name) not in listed and not posixpath.basename(name).startswith(CACHE)
    ]
    return sorted([*others, *(file for files in listed.values() for file in files)])


def _listed(listing: Listing, name: str) -> list[str] | None:
    """Files listed in a state.json; None if another program wrote it."""
    content = _json(listing, name)
    files = content.get("_data_files") if isinstance(content, dict) else None
    if not isinstance(files, list):
        return None
    names = [each.get("filename") if isinstance(each, dict) else None for each in files]
    if not all(isinstance(each, str) for each in names):
        raise ConfigError(f"{listing.name}: {name}: its _data_files lists no files; save the data set again")
    return [str(each) for each in names]


def _json(listing: Listing, name: str) -> object:
    try:
        return json.loads(listing.read_bytes(name))
    except ValueError as error:
        raise ConfigError(f"{listing.name}: {name}: not JSON ({error}); save the data set again") from None


def dict_splits(listing: Listing) -> list[str]:
    """Splits (folders) of a DatasetDict; empty if the folder is not one."""
    if DICT_FILE not in listing.files:
        return []
    content = _json(listing, DICT_FILE)
    splits = content.get("splits") if isinstance(content, dict) else None
    if not isinstance(splits, list) or not all(isinstance(each, str) for each in splits):
        raise ConfigError(f"{listing.name}: {DICT_FILE}: has no list of splits; save the data set again")
    return splits


def open_arrow(
    listing: Listing,
    files: Sequence[str],
    config: SourceConfig,
    stratify: str | None,
    optional: bool = False,
) -> Arrow:
    """List Arrow files; their number of rows is known only after reading.

    Raises:
        ConfigError: a file is damaged, lacks a column, or has other columns than the first one.
    """
    found = {
        name: find_columns(f"{listing.name}: {name}", _schema(listing, name), config, stratify, optional)
        for name in files
    }
    columns = found[files[0]]
    if other := next((name for name in files if found[name] != columns), None):
        raise ConfigError(
            f"{listing.name}: {other} and {files[0]} have different columns; name image_column and "
            "caption_column in data.sources"
        )
    read = columns.identity
    pieces: list[Piece] = [
        ArrowFile(number, name, fingerprint("arrow", listing.folder, name, listing.files[name], read), name)
        for number, name in enumerate(files)
    ]
    place = listing.filesystem, listing.folder
    return Arrow(listing.name, None, pieces, *place, columns, further_columns=columns.further)
