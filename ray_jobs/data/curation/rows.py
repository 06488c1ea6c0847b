"""Rows of a dataset's index, gathered from its many small files into few that are mapped and read in runs.

A scan writes one Parquet file per piece of a source, often of 128 rows. Here runs of them are one Arrow file
each, `dataset/rows/<digest>.arrow`, named after the index files in it. What decides on rows works on one run
at a time, or reads the columns and rows that it needs; no process holds all rows.
"""

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster.storage import Storage
from ray_jobs.config import ConfigError
from ray_jobs.data.curation.scan import FILES_AT_ONCE, SCHEMA, Entry
from ray_jobs.data.curation.workers import InProcess, RayTasks, Workers

VERSION = 3  # version of the files' format; a change gathers anew
ROWS = "rows"
IDENTITY = "identity"
ROWS_A_BATCH = 4096  # that are read together
BYTES_A_RUN = 16 << 20  # of index files, about 100,000 rows
MOST_RUNS = 1024  # with as many partitions, Ray has a million blocks to deal
COUNTS = b"counts"  # key of the rows of each index file, in the metadata of a file of rows
DIGEST = pa.binary(32)
FIELDS = {field.name: field for field in SCHEMA} | {
    "digest": pa.field("digest", DIGEST),
    # Few different values: the numbers of these in a list.
    "role": pa.field("role", pa.dictionary(pa.int32(), pa.string())),
    "stratum": pa.field("stratum", pa.dictionary(pa.int32(), pa.string())),
    "reason": pa.field("reason", pa.dictionary(pa.int32(), pa.string())),
    "text_hash": pa.field("text_hash", pa.uint64()),
}


@dataclass(frozen=True)
class Run:
    """Consecutive rows of the index: `low` to `high` (exclusive) of all rows, in a file of their own."""

    number: int
    file: str
    low: int
    high: int


@dataclass(frozen=True)
class Rows:
    """All rows of an index, in files of runs.

    Attributes:
        storage: folder of the files.
        runs: table of the runs, in the order of the rows.
        counts: rows of each index file, in order.
    """

    storage: Storage
    runs: tuple[Run, ...]
    counts: np.ndarray

    def __len__(self) -> int:
        return self.runs[-1].high if self.runs else 0

    @cached_property
    def starts(self) -> np.ndarray:
        """First row of each index file."""
        return np.cumsum(self.counts) - self.counts

    def of_source(self, entries: Sequence[Entry], number: int) -> range:
        """Return the rows of a source, whose pieces are consecutive entries."""
        inside = np.flatnonzero([entry.source == number for entry in entries])
        if not len(inside):
            return range(0)
        first, last = int(inside[0]), int(inside[-1])
        return range(int(self.starts[first]), int(self.starts[last] + self.counts[last]))

    def for_tasks(self) -> "Rows":
        """Return a copy to send to tasks, without the rows of each index file."""
        return replace(self, counts=np.empty(0, np.int64))

    def workers(self) -> Workers:
        """Return what works on the runs: this process if there is one run."""
        return RayTasks() if len(self.runs) > 1 else InProcess()

    def read(self, low: int, high: int, columns: Sequence[str]) -> pa.Table:
        """Read columns of the rows `low` to `high` (exclusive)."""
        found = [
            read_rows(
                self.storage, run.file, columns, max(low, run.low) - run.low, min(high, run.high) - run.low
            )
            for run in self.runs
            if run.low < high and low < run.high
        ]
        return pa.concat_tables(found) if found else _empty(columns)

    def tables(self, columns: Sequence[str], within: range | None = None) -> Iterator[tuple[int, pa.Table]]:
        """Yield the first row and the table of each run; only rows `within`, if that is given."""
        within = range(len(self)) if within is None else within
        for run in self.runs:
            first, last = max(within.start, run.low), min(within.stop, run.high)
            if first < last:
                yield first, self.read(first, last, columns)

    def take(self, numbers: np.ndarray, columns: Sequence[str]) -> pa.Table:
        """Read the rows `numbers` (int64, ascending), run by run."""
        tables = [_empty(columns)]
        for run in self.runs:
            inside = numbers[(numbers >= run.low) & (numbers < run.high)]
            if len(inside):
                found = read_rows(self.storage, run.file, columns).take(pa.array(inside - run.low))
                tables.append(found)
        return pa.concat_tables([_plain(table) for table in tables])


def gather_rows(
    entries: Sequence[Entry],
    index: Storage,
    dataset: Storage,
    *,
    folder: str = ROWS,
    bytes_a_run: int = BYTES_A_RUN,
    workers: Workers | None = None,
) -> Rows:
    """Gather the rows of index files into files of runs; present ones are kept, others removed.

    Args:
        entries: pieces of the sources, all scanned.
        index: folder of the index files.
        dataset: folder below which the files of rows lie.
        folder: folder of these there.
        bytes_a_run: bytes of index files in a run, at least.
        workers: None: this process if there is one run, else Ray tasks.

    Raises:
        ConfigError: an index file is damaged.
    """
    storage, files = dataset.child(folder), [entry.file for entry in entries]
    sizes, present = index.sizes(), set(storage.files())
    bytes_a_run = max(bytes_a_run, sum(sizes.get(file, 0) for file in files) // MOST_RUNS)
    runs, filled = list[list[str]](), bytes_a_run
    for file in files:
        if filled >= bytes_a_run:
            runs.append([])
            filled = 0
        runs[-1].append(file)
        filled += sizes.get(file, 0)
    workers = workers or (RayTasks() if len(runs) > 1 else InProcess())
    named = [(_name(run), run) for run in runs]
    gather = _Gather(index, storage, frozenset(present & {name for name, _ in named}))
    counts, found = list[np.ndarray](), list[Run]()
    for number, of_files in enumerate(workers.each(gather, named)):
        low = found[-1].high if found else 0
        counts.append(of_files)
        found.append(Run(number, named[number][0], low, low + int(of_files.sum())))
    for file in present - {name for name, _ in named}:
        storage.delete(file)
    return Rows(storage, tuple(found), np.concatenate(counts) if counts else np.empty(0, np.int64))


def _name(files: Sequence[str]) -> str:
    return f"v{VERSION}-{hashlib.sha256(chr(10).join(files).encode()).hexdigest()[:32]}.arrow"


def files_of_rows(storage: Storage) -> list[str]:
    """Return the files of rows in a folder, in the present format."""
    return [file for file in storage.files() if file.startswith(f"v{VERSION}-")]


@dataclass(frozen=True)
class _Gather:
    """Write the rows of index files as one file, unless it is present; return the rows of each."""

    index: Storage
    storage: Storage
    present: frozenset[str]

    def __call__(self, named: tuple[str, list[str]]) -> np.ndarray:
        name, files = named
        if name in self.present:
            with _opened(self.storage, name) as file:
                return np.frombuffer(pa.ipc.open_file(file).schema.metadata[COUNTS], np.int64)
        with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
            tables = list(pool.map(self._read, files))
        counts = np.array([len(table) for table in tables], np.int64)
        table = _as_rows(pa.concat_tables(tables).combine_chunks())
        schema = table.schema.with_metadata({COUNTS: counts.tobytes()})
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, schema) as writer:
            writer.write_table(table.cast(schema), max_chunksize=ROWS_A_BATCH)
        self.storage.write_bytes(name, sink.getvalue().to_pybytes())
        return counts

    def _read(self, file: str) -> pa.Table:
        content = self.index.read_bytes(file)
        try:
            table = pq.ParquetFile(pa.BufferReader(content)).read(use_threads=False)
            for field in SCHEMA:  # earlier releases wrote fewer columns
                if field.name not in table.column_names:
                    table = table.append_column(field, pa.nulls(len(table), field.type))
            return table.select(SCHEMA.names).cast(SCHEMA)
        except (pa.ArrowException, OSError) as error:
            raise ConfigError(
                f"{self.index.uri}/{file}: the index file is damaged ({' '.join(str(error).split())}); "
                "remove it and run the same command again, which looks at its pictures anew"
            ) from None


def _as_rows(table: pa.Table) -> pa.Table:
    """Return rows of the index as files of runs hold them."""
    digests = [digest or "0" * 64 for digest in table["digest"].to_pylist()]
    texts = table["text"].to_pylist()
    columns = {name: table[name] for name in SCHEMA.names}
    columns |= {
        name: table[name].combine_chunks().dictionary_encode() for name in ("role", "stratum", "reason")
    }
    columns["digest"] = pa.FixedSizeBinaryArray.from_buffers(
        DIGEST, len(digests), [None, pa.py_buffer(bytes.fromhex("".join(digests)))]
    )
    columns["text_hash"] = np.array([short_hash(text) for text in texts], np.uint64)
    return pa.table(columns, pa.schema(list(FIELDS.values())))


def short_hash(text: str) -> int:
    """Return 64 bits of a text's SHA-256."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def as_index(table: pa.Table) -> pa.Table:
    """Return rows as the index has them."""
    digests = ["" if digest == "0" * 64 else digest for digest in hex_digests(table)]
    place = table.schema.get_field_index("digest")
    return _plain(table.set_column(place, SCHEMA.field("digest"), pa.array(digests))).select(SCHEMA.names)


def digest_words(table: pa.Table) -> np.ndarray:
    """Return the digests of rows: uint64, N x 4, in an order of words that sorts as the digests do."""
    return np.frombuffer(fixed_bytes(table["digest"], 32), ">u8").reshape(-1, 4).astype(np.uint64)


def hex_digests(table: pa.Table) -> list[str]:
    """Return the digests of rows in hexadecimal."""
    text = fixed_bytes(table["digest"], 32).hex()
    return [text[start : start + 64] for start in range(0, len(text), 64)]


def fixed_bytes(column: pa.ChunkedArray, width: int) -> bytes:
    """Return the values of a column of binaries of `width` bytes, one after the other."""
    return b"".join(
        chunk.buffers()[1].to_pybytes()[chunk.offset * width : (chunk.offset + len(chunk)) * width]
        if len(chunk)
        else b""
        for chunk in column.chunks
    )


def labelled(column: pa.ChunkedArray) -> tuple[np.ndarray, list[str]]:
    """Return the numbers of a dictionary column's values (int32), and the values."""
    whole = column.unify_dictionaries().combine_chunks()
    if isinstance(whole, pa.ChunkedArray):
        whole = whole.chunk(0) if whole.num_chunks else pa.array([], column.type)
    return whole.indices.to_numpy(zero_copy_only=False).astype(np.int32), whole.dictionary.to_pylist()


def _plain(table: pa.Table) -> pa.Table:
    """Return a table with values in the place of numbers of values."""
    found = []
    for field in table.schema:
        found.append(field.with_type(pa.string()) if pa.types.is_dictionary(field.type) else field)
    return table.replace_schema_metadata(None).cast(pa.schema(found))


def _empty(columns: Sequence[str]) -> pa.Table:
    return pa.schema([FIELDS[name] for name in columns]).empty_table()


def _opened(storage: Storage, file: str) -> pa.NativeFile:
    if storage.is_local:
        return pa.memory_map(f"{storage.path.rstrip('/')}/{file}")
    return storage.open_input(file)


def read_rows(
    storage: Storage,
    file: str,
    columns: Sequence[str] = tuple(FIELDS),
    low: int = 0,
    high: int | None = None,
) -> pa.Table:
    """Read columns of a file's rows `low` to `high` (exclusive; None: the last), by batches of ROWS_A_BATCH.

    Of a local file only the accessed part is loaded.

    Raises:
        ConfigError: it is damaged.
    """
    places = [list(FIELDS).index(name) for name in columns]
    options = pa.ipc.IpcReadOptions(included_fields=sorted(places))
    try:
        file_of_rows = pa.ipc.open_file(_opened(storage, file), options=options)
        count, first = file_of_rows.num_record_batches, low // ROWS_A_BATCH
        last = count if high is None else min(count, -(-high // ROWS_A_BATCH))
        batches = [file_of_rows.get_batch(number) for number in range(first, last)]
        found = pa.Table.from_batches(batches, file_of_rows.schema).replace_schema_metadata(None)
        length = None if high is None else high - low
        return found.select(list(columns)).slice(low - first * ROWS_A_BATCH, length)
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise ConfigError(
            f"{storage.uri}/{file}: the file of rows is damaged ({' '.join(str(error).split())}); remove it "
            "and run the same command again"
        ) from None
