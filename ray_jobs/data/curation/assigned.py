"""Splits of the pictures that an earlier run kept, so that a growing dataset moves none of them.

They lie in files of `dataset/assigned/<generation>/`, one per run of rows; `assigned.json` names the
generation. Earlier releases wrote one file, `assigned.parquet`, which is read where the other is missing.
"""

import hashlib
import io
import json
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster.storage import Storage
from ray_jobs.config import Config, ConfigError
from ray_jobs.data.curation.copies import KNOWN, Block
from ray_jobs.data.curation.rows import DIGEST, Rows, Run, digest_words
from ray_jobs.data.curation.workers import Workers
from ray_jobs.run.split import SPLITS

ASSIGNED, ONE_FILE = "assigned.json", "assigned.parquet"
FOLDER = "assigned"


def known_files(config: Config, dataset: Storage) -> list[str]:
    """Return the files with the splits that an earlier run with the same settings assigned."""
    settings = split_settings(config)
    if dataset.exists(ASSIGNED):
        told = dataset.read_json(ASSIGNED)
        if told["settings"] != settings:
            return []
        return [f"{FOLDER}/{told['generation']}/{file}" for file in told["files"]]
    if not dataset.exists(ONE_FILE):
        return []
    metadata = pq.read_schema(pa.BufferReader(dataset.read_bytes(ONE_FILE))).metadata
    return [ONE_FILE] if metadata[b"settings"].decode() == settings else []


def read_known(dataset: Storage, file: str) -> Block:
    """Read the pictures in a file of assigned splits."""
    try:
        table = pq.read_table(pa.BufferReader(dataset.read_bytes(file)))
    except (OSError, pa.ArrowException) as error:
        raise ConfigError(
            f"{dataset.uri}/{file}: the splits of an earlier run cannot be read "
            f"({' '.join(str(error).split())}); restore the file, or remove {ASSIGNED} to assign all anew"
        ) from None
    if table.schema.field("digest").type == pa.string():
        content = bytes.fromhex("".join(table["digest"].to_pylist()))
        digests = pa.FixedSizeBinaryArray.from_buffers(DIGEST, len(table), [None, pa.py_buffer(content)])
        table = table.set_column(table.schema.get_field_index("digest"), "digest", digests)
    numbers = {name: number for number, name in enumerate(SPLITS)}
    splits = np.array([numbers[name] for name in table["split"].to_pylist()], np.uint64)
    return Block(np.full(len(table), KNOWN), digest_words(table)[:, :2], splits)


@dataclass(frozen=True)
class _Write:
    """Write the splits of a run's kept pictures; return the file's name, or None if there are none."""

    rows: Rows
    folder: Storage

    def __call__(self, item: tuple[Run, np.ndarray, np.ndarray]) -> str | None:
        run, numbers, splits = item
        if not len(numbers):
            return None
        table = self.rows.read(run.low, run.high, ["digest"]).take(pa.array(numbers - run.low))
        names = pa.DictionaryArray.from_arrays(pa.array(splits, pa.int8()), list(SPLITS)).cast(pa.string())
        buffer = io.BytesIO()
        pq.write_table(table.append_column("split", names), buffer)
        name = f"{run.number:05d}.parquet"
        self.folder.write_bytes(name, buffer.getvalue())
        return name


def remember(
    config: Config, dataset: Storage, rows: Rows, kept: np.ndarray, splits: np.ndarray, workers: Workers
) -> None:
    """Write the splits of all kept pictures.

    Args:
        kept: bool, N: whether a row is the first of a kept picture.
        splits: uint8, N: number in SPLITS of its split.
    """
    settings = split_settings(config)
    identity = hashlib.sha256(settings.encode())
    for run in rows.runs:
        identity.update(run.file.encode() + np.packbits(kept[run.low : run.high]).tobytes())
        identity.update(splits[run.low : run.high].tobytes())
    generation = identity.hexdigest()[:32]
    folder = dataset.child(FOLDER, generation)
    items = []
    for run in rows.runs:
        numbers = run.low + np.flatnonzero(kept[run.low : run.high])
        items.append((run, numbers, splits[numbers]))
    files = [name for name in workers.each(_Write(rows.for_tasks(), folder), items) if name]
    told = {"settings": settings, "generation": generation, "files": files}
    dataset.write_text(ASSIGNED, json.dumps(told))
    for former in dataset.child(FOLDER).folders():
        if former != generation:
            dataset.child(FOLDER).delete(former)
    if dataset.exists(ONE_FILE):
        dataset.delete(ONE_FILE)


def split_settings(config: Config) -> str:
    """Return the settings that splits depend on; others assign anew."""
    data = config.data
    by = [] if data.split_by == "image" else [data.split_by]
    return json.dumps([data.split_seed, data.validation, data.test, data.stratify, *by])
