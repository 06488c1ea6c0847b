"""Cached rows to a trainer that does nothing: how fast they can come, against a torch DataLoader."""

import json
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from benchmarks.data.measuring import in_fresh_process
from benchmarks.data.pictures import configured
from cluster.connect import joined
from cluster.local import local_cluster
from cluster.storage import Storage
from ray_jobs.config import LocalConfig
from ray_jobs.data.encoding.plan import MAX_ROWS_A_PART
from ray_jobs.data.encoding.tensors import as_torch, read_tensors, tensor_column
from ray_jobs.data.feeding.dataset import PARTS, Dataset
from ray_jobs.data.feeding.streaming import StreamSettings, batches, split_stream
from ray_jobs.run.manifest import Manifest

# What training reads of a row, bfloat16: of 512 x 512 pixels for Stable Diffusion 1.5, and of the demo.
SHAPES = {
    "Stable Diffusion": {
        "latents_mean": (4, 64, 64),
        "latents_logvar": (4, 64, 64),
        "prompt_embeds": (77, 768),
    },
    "demo": {
        "latents_mean": (16, 8, 8),
        "latents_logvar": (16, 8, 8),
        "prompt_embeds": (20, 192),
    },
}
COLUMNS = tuple(SHAPES["demo"])
ROWS = {"smoke": 256, "full": 2_000}
SECONDS = {"smoke": 2.0, "full": 20.0}
ROWS_A_RANK = 8
READERS = 2  # processes of the DataLoaders, all together
Batch = dict[str, torch.Tensor]


def run(size: str) -> dict[str, Any]:
    figures = []
    for name in SHAPES:
        with tempfile.TemporaryDirectory(prefix="diffray-benchmark-") as folder:
            in_fresh_process(write_rows, Path(folder), name, ROWS[size])
            row_bytes = 2 * sum(int(np.prod(shape)) for shape in SHAPES[name].values())
            for world_size in (1, 2):
                found: dict[str, Any] = {"rows": name, "row_bytes": row_bytes, "world_size": world_size}
                found["diffray"] = in_fresh_process(stream, Path(folder), world_size, SECONDS[size])
                found["DataLoader"] = in_fresh_process(load, Path(folder), world_size, SECONDS[size])
                found["ratio"] = found["diffray"]["rows_per_second"] / found["DataLoader"]["rows_per_second"]
                figures.append(found)
                _show(found)
    said = ", ".join(f"{found['rows']} {found['world_size']}: {found['ratio']:.2f}" for found in figures)
    print(f"ratio: of DataLoader's rows a second, by rows and number of ranks: {said}", flush=True)
    return {"stored_rows": ROWS[size], "rows_a_rank": ROWS_A_RANK, "figures": figures}


def _show(found: dict[str, Any]) -> None:
    ranks = "1 rank" if found["world_size"] == 1 else f"{found['world_size']} ranks"
    for name in ("diffray", "DataLoader"):
        rate = found[name]["rows_per_second"]
        print(
            f"{found['rows']:>16}, {ranks:>7}, {name:>10}: {rate:8.0f} rows a second, "
            f"{rate * found['row_bytes'] / 2**20:6.0f} MiB a second; feeds a step of {ROWS_A_RANK} a rank "
            f"every {1e3 * ROWS_A_RANK * found['world_size'] / rate:.1f} ms; "
            f"the first after {found[name]['startup_s']:.1f} s",
            flush=True,
        )


def write_rows(folder: Path, name: str, count: int) -> None:
    """The files of a prepared set that has only what training reads: random bits of numbers below 2."""
    draw = torch.Generator().manual_seed(0)
    storage, parts = Storage.open(str(folder)), []
    (folder / "cache").mkdir()
    for start in range(0, count, MAX_ROWS_A_PART):
        rows = min(MAX_ROWS_A_PART, count - start)
        columns = [
            tensor_column(column, torch.rand((rows, *shape), generator=draw).bfloat16())
            for column, shape in SHAPES[name].items()
        ]
        table = pa.Table.from_arrays([c for _, c in columns], schema=pa.schema([f for f, _ in columns]))
        file = f"{start:06d}.parquet"
        pq.write_table(
            table, folder / "cache" / file, compression="none", use_dictionary=False, row_group_size=rows
        )
        parts.append({"split": "train", "fold": 0, "source": 0, "bucket": "one", "rows": rows, "file": file})
    storage.write_text(PARTS, json.dumps(parts))


def stream(folder: Path, world_size: int, seconds: float) -> dict[str, float]:
    """The product's stream: a short run that tells how many steps to take, then the one that counts."""
    storage = Storage.open(str(folder))
    dataset = Dataset(storage, storage.child("cache"), Manifest())
    config = configured(folder, folder)
    settings = StreamSettings(config, world_size * ROWS_A_RANK, world_size, COLUMNS)
    epoch = dataset.num_rows("train") // settings.rows_a_step

    def take(last_step: int) -> dict[str, float]:
        def opened() -> list[Iterator[Batch]]:
            ends = split_stream(dataset, settings, first_step=1, last_step=last_step)
            return [batches(end, rank=rank, first_step=1) for rank, end in enumerate(ends)]

        return consume(opened, None)

    with local_cluster(LocalConfig()) as cluster, joined(cluster.gcs_address):
        rate = take(2 * epoch)["rows_per_second"]
        return take(max(2 * epoch, int(seconds * rate / settings.rows_a_step)))


class Files(IterableDataset[Batch]):
    """Batches without end: files in a shuffled order, one at a time, and its rows shuffled."""

    def __init__(self, files: list[Path]) -> None:
        self.files = files

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        assert worker is not None
        draw = np.random.default_rng(worker.id)
        mine = self.files[worker.id :: worker.num_workers]
        while True:
            for number in draw.permutation(len(mine)):
                # Arrow's own threads would abort a reader that is told to end while they run.
                table = pq.ParquetFile(mine[number]).read(list(COLUMNS), use_threads=False)
                tensors = {n: as_torch(v) for n, v in read_tensors(table, list(COLUMNS)).items()}
                order = torch.from_numpy(draw.permutation(len(table)))
                for rows in order[: len(order) // ROWS_A_RANK * ROWS_A_RANK].split(ROWS_A_RANK):
                    yield {name: tensor[rows] for name, tensor in tensors.items()}


def load(folder: Path, world_size: int, seconds: float) -> dict[str, float]:
    """The rival: a DataLoader a rank, which share READERS processes and the files."""
    files = sorted((folder / "cache").iterdir())

    def opened() -> list[Iterator[Batch]]:
        return [
            iter(DataLoader(Files(files[r::world_size]), batch_size=None, num_workers=READERS // world_size))
            for r in range(world_size)
        ]

    return consume(opened, seconds)


def consume(opened: Callable[[], Iterable[Iterator[Batch]]], seconds: float | None) -> dict[str, float]:
    """Take batches as fast as they come, a thread a rank, to the end or for so many seconds.

    Returns:
        rows_per_second: of all ranks, after the first batch of each; startup_s: until all have that one.
    """
    start = time.perf_counter()
    rates: list[float] = []
    firsts: list[float] = []
    failed: list[BaseException] = []

    def take(batches: Iterator[Batch]) -> None:
        try:
            next(batches)
            begin, rows = time.perf_counter(), 0
            firsts.append(begin - start)
            for batch in batches:
                rows += len(batch["latents_mean"])
                if seconds is not None and time.perf_counter() - begin > seconds:
                    break
            rates.append(rows / (time.perf_counter() - begin))
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=take, args=(each,)) for each in opened()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    return {"rows_per_second": sum(rates), "startup_s": max(firsts)}
