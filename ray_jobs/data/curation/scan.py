"""Scan a dataset: read and measure every picture once, and record it in an index.

The index has one Parquet file per piece of the sources, with one row per picture and no pixels. A file is
named after its dependencies, so that only the new part of a grown dataset or interrupted scan is scanned.
"""

import hashlib
import io
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster.storage import Storage
from ray_jobs.config import DataConfig
from ray_jobs.data.curation.cleaning import FIRST_LOOK_SIDE, measure
from ray_jobs.data.curation.splits import content_digest
from ray_jobs.data.sources.detection import Piece, Sample, Source
from ray_jobs.data.sources.samples import LeftOut
from ray_jobs.pictures.reading import WHITE, Picture, Rejected, read_picture

RayRow = dict[str, Any]  # of Ray Data, by column: values of Arrow, or any object

VERSION = 4  # version of the measures; a change scans anew
CONTROL_IMAGE, MASK = "control image", "mask"
FILES_AT_ONCE = 16  # index files read in parallel
PIECES_HERE, THREADS_HERE, SECONDS_HERE = 16, 2, 15.0  # that are scanned in the driver, and how long
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
        ("further", pa.list_(pa.string())),  # digests of the files of references, the control image, the mask
        ("references", pa.list_(pa.list_(pa.int32()))),  # width and height of each
        ("identity", pa.binary(16)),  # of what is listed of the row, and the scan's settings; null if unknown
    ]
)


@dataclass(frozen=True)
class Entry:
    """A piece of a source, and its file in the index."""

    source: int
    piece: Piece
    file: str


def scan_settings(sources: Sequence[Source], config: DataConfig) -> list[str]:
    """Return what the scan of each source depends on beside its pieces."""
    settings = [VERSION, config.cleaning.max_pixels, config.background, config.column]
    settings += ["masks", WHITE] if config.has_masks else []
    settings += ["measured references"] if config.num_references else []
    settings += ["control"] if config.brings_control else []
    return [json.dumps([*settings, vars(source.captions), *source.further_columns]) for source in sources]


def entries(sources: Sequence[Source], config: DataConfig) -> list[Entry]:
    """List all pieces in source order, with the names of their index files."""
    scanned = scan_settings(sources, config)
    return [
        Entry(
            number,
            piece,
            hashlib.sha256(f"{scanned[number]}{piece.digest}".encode()).hexdigest()[:32] + ".parquet",
        )
        for number, source in enumerate(sources)
        for piece in source.pieces
    ]


class Before(Protocol):
    """Rows of a piece that an earlier scan looked at."""

    @property
    def rows(self) -> np.ndarray:
        """Their numbers in the piece, ascending: int32."""

    def table(self) -> pa.Table:
        """Read them, as the index has them."""


@dataclass(frozen=True)
class ScanPiece:
    """Look at the pictures of a piece, but for those known from before, and write its index file.

    Input: one row with an entry, and its `Before` or None. Output: the number of its rows.
    """

    readers: list[Source]
    config: DataConfig
    settings: list[str]  # of each source's scan
    index: Storage

    def __call__(self, row: RayRow) -> RayRow:
        entry, before = row["entry"], row["before"]
        tables = [before.table()] if before else []
        wanted = _Others(set(before.rows.tolist())) if before else None
        if before is None or len(before.rows) < len(entry.piece.identities()):
            reader = self.readers[entry.source]
            rows = [scan_sample(sample, self.config) for sample in reader.read(entry.piece, wanted)]
            if entry.piece.has_identities and reader.captions.lines != "each":
                identities = scan_identities(entry.piece, self.settings[entry.source])
                rows = [each | {"identity": identities[int(str(each["row"]))]} for each in rows]
            tables.append(pa.Table.from_pylist(rows, schema=SCHEMA))
        table = pa.concat_tables(tables).sort_by("row")
        content = io.BytesIO()
        pq.write_table(table, content)
        self.index.write_bytes(entry.file, content.getvalue())
        return {"rows": len(table)}


@dataclass(frozen=True)
class _Others:
    """All rows but some."""

    known: set[int]

    def __contains__(self, row: object) -> bool:
        return row not in self.known


def scan_identities(piece: Piece, settings: str) -> list[bytes]:
    """Return the identity of what a scan with these settings finds of each row of a piece."""
    start = settings.encode()
    return [hashlib.sha256(start + each).digest()[:16] for each in piece.identities()]


def missing_entries(found: Sequence[Entry], index: Storage) -> list[Entry]:
    """Return the entries without an index file."""
    present = set(index.files())
    return [entry for entry in found if entry.file not in present]


def scan(
    sources: Sequence[Source],
    missing: Sequence[Entry],
    config: DataConfig,
    index: Storage,
    progress: Callable[[int], None],
    before: "Mapping[str, Before] | None" = None,
) -> None:
    """Write the missing index files, one per piece: the first ones here, and by Ray Data tasks what remains.

    Tasks take longer to start than a small folder takes to look at.

    Args:
        missing: result of `missing_entries`.
        progress: callback that receives the number of rows after each piece.
        before: by index file, its rows that an earlier scan looked at.
    """
    if not missing:
        return
    scan_piece = ScanPiece(
        [source.reader() for source in sources], config, scan_settings(sources, config), index
    )
    items = [{"entry": entry, "before": (before or {}).get(entry.file)} for entry in missing]
    done = 0
    if len(items) <= PIECES_HERE and all(_is_small(entry.piece) for entry in missing):
        done, items = _scanned_here(scan_piece, items, progress)
    if not items:
        return
    import ray.data

    blocks = min(len(items), 1024)
    for row in ray.data.from_items(items, override_num_blocks=blocks).map(scan_piece).iter_rows():
        done += row["rows"]
        progress(done)


def _scanned_here(
    scan_piece: ScanPiece, items: list[RayRow], progress: Callable[[int], None]
) -> tuple[int, list[RayRow]]:
    """Scan pieces in this process while that is quick; return the number of rows, and what remains."""
    done, begin = 0, time.monotonic()
    with ThreadPoolExecutor(THREADS_HERE) as pool:
        while items and time.monotonic() - begin < SECONDS_HERE:
            some, items = items[:THREADS_HERE], items[THREADS_HERE:]
            done += sum(row["rows"] for row in pool.map(scan_piece, some))
            progress(done)
    return done, items


def _is_small(piece: Piece) -> bool:
    """Whether a piece is rows of a folder, or files that are no rows: others hold any number of pictures."""
    return piece.has_identities or isinstance(piece, LeftOut)


def scan_sample(sample: Sample, config: DataConfig) -> dict[str, object]:
    """Return a row of the index: the picture's measures, or the reason why it cannot be read.

    Thresholds are not applied here, so that they can be changed without another scan.
    """
    row: dict[str, object] = {name: None for name in SCHEMA.names}
    row |= {
        name: getattr(sample, name)
        for name in ("row", "name", "text", "role", "stratum", "repaired", "lines")
    }
    row |= {"reason": "", "detail": "", "digest": ""}
    try:
        if sample.problem:
            raise sample.problem
        row["digest"] = content_digest(sample.data)
        picture = _first_look(sample.data, config)
        row |= vars(measure(picture))
        references: list[list[int]] = []
        control, mask = _last_roles(len(sample.further), config)
        for number, data in enumerate(sample.further, 1):
            role = {control: CONTROL_IMAGE, mask: MASK}.get(number, f"reference {number}")
            further = _further(role, data, config)
            if number == mask:
                _check_mask(further, picture)
            elif number == control:
                _check_control(further, picture)
            else:
                references.append([further.width, further.height])
        row["references"] = references
        row["further"] = [content_digest(data) for data in sample.further]
    except Rejected as rejected:
        row |= {"reason": rejected.reason, "detail": rejected.detail}
    return row


def _first_look(data: bytes, config: DataConfig) -> Picture:
    """Read a picture that is only measured."""
    return read_picture(
        data,
        background=config.background,
        max_pixels=config.cleaning.max_pixels,
        at_least=FIRST_LOOK_SIDE,
    )


def _last_roles(count: int, config: DataConfig) -> tuple[int, int]:
    """Return which of a row's further pictures, from 1, are the control image and the mask; 0 for none."""
    mask = count if config.has_masks else 0
    return (count - config.has_masks if config.brings_control else 0), mask


def _further(role: str, data: bytes, config: DataConfig) -> Picture:
    """Read a reference picture, control image or mask, named by its role."""
    try:
        return _first_look(data, config)
    except Rejected as rejected:
        raise Rejected("incomplete", f"{role}: {rejected.reason}: {rejected.detail}") from None


def _check_control(control: Picture, picture: Picture) -> None:
    """Raise Rejected if a control image has another shape than its picture, so that it is cut differently."""
    width, height = picture.width, picture.height
    # As far as rounding to whole pixels changes the shape of a smaller or larger one.
    if abs(control.width * height - control.height * width) > width + height:
        told = f"{control.width} x {control.height} and the picture {width} x {height}"
        raise Rejected("control_of_another_shape", f"the control image has {told} pixels")


def _check_mask(mask: Picture, picture: Picture) -> None:
    """Raise Rejected if a mask does not belong to its picture, is transparent, or is dark."""
    sizes = [(each.width, each.height) for each in (mask, picture)]
    if sizes[0] != sizes[1]:
        told = " and the picture ".join(f"{width} x {height}" for width, height in sizes)
        raise Rejected("mask_of_another_size", f"the mask has {told} pixels")
    if mask.is_transparent:  # white where one paints on nothing, and black where one erases
        raise Rejected("transparent_mask", "the mask has transparent pixels, neither white nor black")
    # Masks that are nowhere white hold numbers of classes, as 0 and 1, or colours.
    if (brightest := int(np.asarray(mask.image.convert("L")).max())) < WHITE:
        raise Rejected("empty_mask", f"the mask's brightest pixel has {brightest} of 255")


def read_index(index: Storage, files: Sequence[str], columns: Sequence[str]) -> Iterator[pa.Table]:
    """Yield the tables of index files in order, reading a few ahead."""

    def read(file: str) -> pa.Table:
        # A third of the time of `read_table`, which plans a scan of a data set for these few rows.
        return pq.ParquetFile(pa.BufferReader(index.read_bytes(file))).read(list(columns), use_threads=False)

    with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
        for start in range(0, len(files), FILES_AT_ONCE):
            yield from pool.map(read, files[start : start + FILES_AT_ONCE])
