"""The first look at a set: every picture is read once, measured, and written down in an index.

The index holds one Parquet file a piece of the sources, one row a picture, no pixels. A file is named by
what it depends on, so that a set that has grown is scanned only where it is new, and so is a scan that
was interrupted.
"""

import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster.storage import Storage
from ray_jobs.config import DataConfig
from ray_jobs.data.curation.cleaning import FIRST_LOOK_SIDE, measure
from ray_jobs.data.curation.duplicates import Pictures
from ray_jobs.data.curation.splits import content_digest
from ray_jobs.data.sources.detection import Piece, Sample, Source
from ray_jobs.pictures.reading import Rejected, read_picture

VERSION = 4  # of what a scan measures; another one scans anew
FILES_AT_ONCE = 16  # index files that are read side by side
SCHEMA = pa.schema(
    [
        ("row", pa.int32()),
        ("name", pa.string()),
        ("text", pa.string()),
        ("role", pa.string()),
        ("stratum", pa.string()),
        ("repaired", pa.bool_()),
        ("lines", pa.int32()),
        ("digest", pa.string()),
        ("reason", pa.string()),
        ("detail", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("sharpness", pa.float32()),
        ("contrast", pa.float32()),
        ("dark", pa.float32()),
        ("bright", pa.float32()),
        ("hash", pa.uint64()),
        ("colours", pa.binary(48)),
    ]
)


@dataclass(frozen=True)
class Entry:
    """A piece of a source, and its file in the index."""

    source: int
    piece: Piece
    file: str


def entries(sources: Sequence[Source], config: DataConfig) -> list[Entry]:
    """All pieces in the order of the sources, with the names of their index files."""
    settings = [VERSION, config.cleaning.max_pixels, config.background, config.stratify]
    scanned = [json.dumps([*settings, vars(source.captions)]) for source in sources]
    return [
        Entry(
            number,
            piece,
            hashlib.sha256(f"{scanned[number]}{piece.digest}".encode()).hexdigest()[:32] + ".parquet",
        )
        for number, source in enumerate(sources)
        for piece in source.pieces
    ]


def scan(
    sources: Sequence[Source],
    found: Sequence[Entry],
    config: DataConfig,
    index: Storage,
    progress: Callable[[int], None],
) -> None:
    """Write the index files that are missing, by Ray Data tasks, a piece each.

    Args:
        found: from `entries`.
        progress: is told the number of rows after each piece.
    """
    import ray.data

    present = set(index.files())
    missing = [entry for entry in found if entry.file not in present]
    if not missing:
        return
    readers = [source.reader() for source in sources]

    def scan_piece(row: dict[str, Any]) -> dict[str, Any]:
        entry = row["entry"]
        rows = [scan_sample(s, config) for s in readers[entry.source].read(entry.piece)]
        index.write_bytes(entry.file, _parquet(rows))
        return {"rows": len(rows)}

    items = [{"entry": entry} for entry in missing]
    done = 0
    for row in (
        ray.data.from_items(items, override_num_blocks=min(len(items), 1024)).map(scan_piece).iter_rows()
    ):
        done += row["rows"]
        progress(done)


def scan_sample(sample: Sample, config: DataConfig) -> dict[str, Any]:
    """A row of the index: what the picture measures, or the reason why it cannot be read. Thresholds are not
    applied here, so that others can be tried without another scan."""
    row: dict[str, Any] = {name: None for name in SCHEMA.names}
    row |= {
        name: getattr(sample, name)
        for name in ("row", "name", "text", "role", "stratum", "repaired", "lines")
    }
    row |= {"reason": "", "detail": "", "digest": ""}
    try:
        if sample.problem:
            raise sample.problem
        row["digest"] = content_digest(sample.data)
        picture = read_picture(
            sample.data,
            background=config.background,
            max_pixels=config.cleaning.max_pixels,
            at_least=FIRST_LOOK_SIDE,
        )
        row |= vars(measure(picture))
    except Rejected as rejected:
        row |= {"reason": rejected.reason, "detail": rejected.detail}
    return row


def _parquet(rows: Iterable[dict[str, Any]]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows), schema=SCHEMA), buffer)
    return buffer.getvalue()


def read_index(index: Storage, files: Sequence[str], columns: Sequence[str]) -> Iterator[pa.Table]:
    """The tables of index files, in order, a few read ahead."""

    def read(file: str) -> pa.Table:
        return pq.read_table(io.BytesIO(index.read_bytes(file)), columns=list(columns))

    with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
        for start in range(0, len(files), FILES_AT_ONCE):
            yield from pool.map(read, files[start : start + FILES_AT_ONCE])


@dataclass(frozen=True)
class HashPart:
    """The hashes of some index files, read where they are compared.

    Attributes:
        ids: of each row of these files, in order: its picture's number, or -1 for a row that is not compared.
    """

    index: Storage
    files: list[str]
    ids: np.ndarray

    def __call__(self) -> Pictures:
        """The rows that are compared."""
        tables = list(read_index(self.index, self.files, ["hash", "colours"]))
        table = pa.concat_tables(tables)
        rows = np.flatnonzero(self.ids >= 0)
        taken = table.take(rows)
        colours = np.frombuffer(b"".join(taken["colours"].to_pylist()), np.uint8).reshape(-1, 48)
        return Pictures(self.ids[rows], taken["hash"].to_numpy().astype(np.uint64), colours)
