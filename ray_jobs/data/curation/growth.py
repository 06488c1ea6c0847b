"""Pictures that an earlier scan looked at, so that a dataset that has grown is scanned only where it is new.

Index files are named after whole pieces of a source, so a file that is added to a folder changes those of all
pictures after it. The rows of a folder have identities: what is listed of a row, with sizes and times of its
files. Rows of the last run are found by these in the files of `dataset/rows/`, wherever they were.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from cluster.storage import Storage
from ray_jobs.config import DataConfig
from ray_jobs.data.curation.rows import IDENTITY, ROWS, as_index, files_of_rows, fixed_bytes, read_rows
from ray_jobs.data.curation.scan import Entry, scan_identities, scan_settings
from ray_jobs.data.curation.workers import InProcess, RayTasks, Workers
from ray_jobs.data.sources.samples import Piece, Source

PIECES_A_TASK = 256
ROWS_A_PARTITION = 1 << 20
FORMER, MISSING = 0, 1  # kinds of rows in a block, as they sort


@dataclass(frozen=True)
class LookedAt:
    """Rows of a piece that an earlier scan looked at, on storage.

    Attributes:
        storage: folder of the files.
        rows: int32, N: numbers of these rows in their piece, ascending.
        files: files that hold them.
        of: int32, N: number in `files` of each row's file.
        places: int32, N: its row in that file.
    """

    storage: Storage
    rows: np.ndarray
    files: list[str]
    of: np.ndarray
    places: np.ndarray

    def table(self) -> pa.Table:
        """Read the rows, as the index has them."""
        tables, numbers = [], []
        for number, file in enumerate(self.files):
            inside = self.of == number
            tables.append(as_index(read_rows(self.storage, file).take(pa.array(self.places[inside]))))
            numbers.append(self.rows[inside])
        table = pa.concat_tables(tables)
        return table.set_column(0, table.schema.field("row"), pa.array(np.concatenate(numbers), pa.int32()))


def looked_at_before(
    sources: Sequence[Source],
    missing: Sequence[Entry],
    config: DataConfig,
    dataset: Storage,
    workers: Workers | None = None,
) -> dict[str, LookedAt]:
    """Return the rows of missing index files, by these, that the last run's files hold.

    Args:
        workers: None: this process if little is missing, else Ray tasks.
    """
    storage = dataset.child(ROWS)
    settings, files = scan_settings(sources, config), files_of_rows(storage)
    pieces = [
        (number, entry.piece, settings[entry.source])
        for number, entry in enumerate(missing)
        if entry.piece.has_identities and sources[entry.source].captions.lines != "each"
    ]
    if not files or not pieces:
        return {}
    groups = [pieces[start : start + PIECES_A_TASK] for start in range(0, len(pieces), PIECES_A_TASK)]
    workers = workers or (RayTasks() if len(groups) + len(files) > 4 else InProcess())
    partitions = -(-len(pieces) * 128 // ROWS_A_PARTITION)
    items: list[tuple[int, str] | list[_Missing]] = [*enumerate(files), *groups]
    _, found = workers.shuffle(_Deal(storage, partitions), items, _match, partitions)
    pairs = np.concatenate([np.empty((0, 4), np.int32), *found])
    if not len(pairs):
        return {}
    pairs = pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]
    numbers, starts = np.unique(pairs[:, 0], return_index=True)
    known: dict[str, LookedAt] = {}
    for number, own in zip(numbers.tolist(), np.split(pairs, starts[1:]), strict=True):
        used, of = np.unique(own[:, 2], return_inverse=True)
        names = [files[file] for file in used.tolist()]
        known[missing[number].file] = LookedAt(storage, own[:, 1], names, of.astype(np.int32), own[:, 3])
    return known


class _Block(NamedTuple):
    words: np.ndarray  # uint64, N x 2: identities
    kind: int
    of: np.ndarray  # int32, N: number of the file, or of the missing entry
    rows: np.ndarray  # int32, N: row in it


_Missing = tuple[int, Piece, str]  # number of an entry, its piece, and the settings of its scan


@dataclass(frozen=True)
class _Deal:
    """Divide rows by their identities: those of an earlier file, or of missing pieces."""

    storage: Storage
    num_partitions: int

    def __call__(self, item: tuple[int, str] | list[_Missing]) -> tuple[None, list[_Block]]:
        whole = _of_file(self.storage, *item) if isinstance(item, tuple) else _of_pieces(item)
        receivers = whole.words[:, 1] % np.uint64(self.num_partitions)
        blocks = []
        for number in range(self.num_partitions):
            inside = receivers == number
            blocks.append(_Block(whole.words[inside], whole.kind, whole.of[inside], whole.rows[inside]))
        return None, blocks


def _of_file(storage: Storage, number: int, file: str) -> _Block:
    column = read_rows(storage, file, [IDENTITY])[IDENTITY]
    places = np.flatnonzero(column.is_valid().to_numpy())
    content = fixed_bytes(column.take(pa.array(places)), 16)
    words = np.frombuffer(content, np.uint64).reshape(-1, 2)
    return _Block(words, FORMER, np.full(len(places), number, np.int32), places.astype(np.int32))


def _of_pieces(pieces: Sequence[_Missing]) -> _Block:
    words, of, rows = list[bytes](), list[np.ndarray](), list[np.ndarray]()
    for number, piece, settings in pieces:
        found = scan_identities(piece, settings)
        words += found
        of.append(np.full(len(found), number, np.int32))
        rows.append(np.arange(len(found), dtype=np.int32))
    whole = np.frombuffer(b"".join(words), np.uint64).reshape(-1, 2)
    return _Block(whole, MISSING, np.concatenate(of), np.concatenate(rows))


def _match(blocks: Sequence[_Block]) -> np.ndarray:
    """Return missing rows that an earlier file has: entry, row, file, row in it: int32, N x 4."""
    words = np.concatenate([block.words for block in blocks])
    kinds = np.concatenate([np.full(len(block.of), block.kind) for block in blocks])
    places = np.concatenate([np.column_stack([block.of, block.rows]) for block in blocks])
    order = np.lexsort((kinds, words[:, 1], words[:, 0]))
    words, kinds, places = words[order], kinds[order], places[order]
    begins = np.ones(len(words), bool)
    begins[1:] = (words[1:] != words[:-1]).any(axis=1)
    first = np.maximum.accumulate(np.where(begins, np.arange(len(words)), 0))
    wanted = np.flatnonzero((kinds == MISSING) & (kinds[first] == FORMER))
    return np.column_stack([places[wanted], places[first[wanted]]]).astype(np.int32)
