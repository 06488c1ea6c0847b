"""Scan a dataset: read and measure every picture once, and record it in an index.

The index has one Parquet file per piece of the sources, with one row per picture and no pixels. A file is
named after its dependencies, so that only the new part of a grown dataset or interrupted scan is scanned.
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
from ray_jobs.data.curation.splits import content_digest
from ray_jobs.data.sources.detection import Piece, Sample, Source
from ray_jobs.pictures.reading import WHITE, Picture, Rejected, read_picture

RayRow = dict[str, Any]  # of Ray Data, by column: values of Arrow, or any object

VERSION = 4  # version of the measures; a change scans anew
CONTROL_IMAGE, MASK = "control image", "mask"
FILES_AT_ONCE = 16  # index files read in parallel
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
    ]
)


@dataclass(frozen=True)
class Entry:
    """A piece of a source, and its file in the index."""

    source: int
    piece: Piece
    file: str


def entries(sources: Sequence[Source], config: DataConfig) -> list[Entry]:
    """List all pieces in source order, with the names of their index files."""
    settings = [VERSION, config.cleaning.max_pixels, config.background, config.column]
    settings += ["masks", WHITE] if config.has_masks else []
    settings += ["measured references"] if config.num_references else []
    settings += ["control"] if config.brings_control else []
    scanned = [json.dumps([*settings, vars(source.captions), *source.further_columns]) for source in sources]
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
    """Write the missing index files by Ray Data tasks, one per piece.

    Args:
        found: result of `entries`.
        progress: callback that receives the number of rows after each piece.
    """
    import ray.data

    present = set(index.files())
    missing = [entry for entry in found if entry.file not in present]
    if not missing:
        return
    readers = [source.reader() for source in sources]

    def scan_piece(row: RayRow) -> RayRow:
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


def _parquet(rows: Iterable[dict[str, object]]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows), schema=SCHEMA), buffer)
    return buffer.getvalue()


def read_index(index: Storage, files: Sequence[str], columns: Sequence[str]) -> Iterator[pa.Table]:
    """Yield the tables of index files in order, reading a few ahead."""

    def read(file: str) -> pa.Table:
        # A third of the time of `read_table`, which plans a scan of a data set for these few rows.
        return pq.ParquetFile(pa.BufferReader(index.read_bytes(file))).read(list(columns), use_threads=False)

    with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
        for start in range(0, len(files), FILES_AT_ONCE):
            yield from pool.map(read, files[start : start + FILES_AT_ONCE])
