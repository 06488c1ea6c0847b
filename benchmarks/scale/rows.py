"""Rows of a data set: what `prepare` does with the index of so many pictures, in its driver.

The pictures do not exist: their index is written as a scan would, with random measures, so that nothing is
left to scan. All that follows is prepare's own: the sources are listed, each row is judged, near duplicates
are looked for, splits assigned, parts planned and described; then the order of training is made.
"""

import hashlib
import io
import json
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.data.measuring import in_fresh_process
from benchmarks.data.pictures import configured, photograph
from benchmarks.scale.memory import largest, resident
from cluster.connect import joined
from cluster.local import local_cluster
from cluster.storage import Storage
from ray_jobs.config import Config
from ray_jobs.data.curation.decisions import decide
from ray_jobs.data.curation.findings import write_findings
from ray_jobs.data.curation.scan import SCHEMA, entries, scan_sample
from ray_jobs.data.encoding.outlines import outline
from ray_jobs.data.encoding.plan import Planner, chunks
from ray_jobs.data.feeding.order import Order, Part
from ray_jobs.data.manifest import describe
from ray_jobs.data.preparation import open_sources
from ray_jobs.data.sources.samples import Sample

SIZES = (1_000, 10_000, 100_000, 1_000_000)
SCANNED = 64  # pictures
SIDE = 512  # pixels
WINDOW_ROWS = 1024  # 256 MiB, data.shuffle_mb, of rows of 512 x 512 pixels


def run(sizes: list[int]) -> dict[str, Any]:
    found = []
    for size in sizes:
        with tempfile.TemporaryDirectory(prefix="diffray-benchmark-") as folder:
            in_fresh_process(write_index, Path(folder), size)
            found.append(in_fresh_process(measure, Path(folder), size))
    return {"scan": in_fresh_process(scanning), "sizes": found}


def settings(folder: Path) -> Config:
    return configured(folder / "pictures", folder / "runs", f"data.resolution={SIDE}")


def dataset_of(config: Config) -> Storage:
    return Storage.open(config.storage).child(config.name, "dataset")


def write_index(folder: Path, size: int) -> None:
    """metadata.jsonl, and the index that a scan of its pictures would write."""
    (folder / "pictures").mkdir()
    with (folder / "pictures" / "metadata.jsonl").open("w", encoding="utf-8") as metadata:
        for number in range(size):
            line = {"file_name": f"{number:09d}.jpg", "text": f"picture {number} of nothing"}
            metadata.write(json.dumps(line) + "\n")
    config, draw = settings(folder), np.random.default_rng(0)
    index, first = dataset_of(config).child("index"), 0
    for entry in entries(open_sources(config), config.data):
        count = len(entry.piece.rows)  # type: ignore[attr-defined]
        buffer = io.BytesIO()
        pq.write_table(scanned(range(first, first + count), draw), buffer)
        index.write_bytes(entry.file, buffer.getvalue())
        first += count


def scanned(numbers: range, draw: np.random.Generator) -> pa.Table:
    """Rows of the index: pictures of which none is like another."""
    count = len(numbers)
    plain = {"role": "instance", "stratum": "", "reason": "", "detail": "", "width": SIDE, "height": SIDE}
    plain |= {"repaired": False, "lines": 1}
    plain |= {"sharpness": 500.0, "contrast": 50.0, "dark": 0.1, "bright": 0.1}
    columns: dict[str, Any] = {name: [value] * count for name, value in plain.items()}
    columns |= {
        "row": range(count),
        "name": [f"{number:09d}.jpg" for number in numbers],
        "text": [f"picture {number} of nothing" for number in numbers],
        "digest": [hashlib.sha256(str(number).encode()).hexdigest() for number in numbers],
        "hash": draw.integers(0, 2**64, count, np.uint64),
        "colours": [fields.tobytes() for fields in draw.integers(0, 256, (count, 48), np.uint8)],
    }
    return pa.table({name: columns.get(name, [None] * count) for name in SCHEMA.names}, schema=SCHEMA)


def measure(folder: Path, size: int) -> dict[str, float]:
    """Seconds of each of prepare's stages in the driver, its memory, and the size of what it writes."""
    config, spent = settings(folder), dict[str, float]()

    @contextmanager
    def told(stage: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        spent[f"{stage}_s"] = time.perf_counter() - begin

    storage = dataset_of(config)
    with local_cluster(config.local) as cluster, joined(cluster.gcs_address):
        before = resident()
        with told("list"):
            sources = open_sources(config)
            found = entries(sources, config.data)
        with told("decide"):
            decisions = decide(config, found, storage.child("index"), storage)
            write_findings(decisions, config, storage)
        with told("plan"):
            planner = Planner.of(config, decisions, [(SIDE, SIDE)])
            workers = decisions.rows.workers()
            outlines = outline(planner, chunks(found, decisions), len(decisions.rows), workers)
            parts, counts = outlines.parts, Counter[str]()
            for part in parts:
                counts[part.split] += part.num_rows
            described = describe(config, sources, decisions, parts, counts, outlines.digest)
            manifest = json.dumps(described.fields())
            records = [part.record() for part in parts]
    with told("order"):
        training = [Part(part["rows"]) for part in records if part["split"] == "train"]
        order = Order(training, batch_size=config.train.batch_size, window_rows=WINDOW_ROWS, seed=0)
        order.steps(next(order.windows(1, 1)))
    assert counts.total() == size, "rows were set aside"
    return {
        "size": size,
        **spent,
        "driver_mib": largest() - before,
        "parts": len(parts),
        "parts_json_mib": len(json.dumps(records)) / 2**20,
        "manifest_kib": len(manifest) / 2**10,
    }


def scanning() -> dict[str, float]:
    """Milliseconds that `scan_sample` takes for a picture of 512 x 384 pixels, on one core."""
    files = []
    for number in range(SCANNED):
        buffer = io.BytesIO()
        photograph(number).save(buffer, "JPEG", quality=90)
        files.append(buffer.getvalue())
    config = settings(Path())
    begin = time.perf_counter()
    for number, data in enumerate(files):
        row = scan_sample(Sample(number, "", "a caption", data, "", "instance", None), config.data)
        assert not row["reason"], row
    seconds = time.perf_counter() - begin
    return {"ms_a_picture": 1e3 * seconds / SCANNED, "kib_a_picture": sum(map(len, files)) / SCANNED / 2**10}
