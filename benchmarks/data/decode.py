"""Decode, crop, encode and write: the product's pipeline against a torch DataLoader that does the same work.

Both encode in one process, with one thread, and decode in one other. Reading the files is a third process of
the product's, which sends their bytes to the decoder; the DataLoader's decoding process reads them itself.
"""

import tempfile
import time
from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from benchmarks.data.measuring import in_fresh_process
from benchmarks.data.pictures import configured, photograph, write_folder
from cluster.connect import joined
from cluster.local import local_cluster
from cluster.storage import Storage
from ray_jobs.config import Config, LocalConfig
from ray_jobs.data.curation.scan import Entry
from ray_jobs.data.curation.splits import content_digest
from ray_jobs.data.encoding.encoding import EncodeRows, Planned, encode_parts
from ray_jobs.data.encoding.geometry import fit
from ray_jobs.data.encoding.plan import PlannedPart, Planner, chunks
from ray_jobs.data.encoding.tensors import tensor_column
from ray_jobs.data.preparation import examine, open_sources
from ray_jobs.data.sources.samples import Piece, Sample, Source
from ray_jobs.pictures.reading import encode_png, read_picture

COUNTS = {"smoke": 300, "full": 3_000}
TURNS = 2
DECODERS = 1
CPUS = 2.5  # an encoder, a decoder, and half a one for what reads
SAME = ("key", "digest", "text", "image", "latents_mean", "latents_logvar", "input_ids", "prompt_embeds")


@dataclass(frozen=True)
class Work:
    """What both do."""

    config: Config
    sources: list[Source]
    entries: list[Entry]
    parts: list[PlannedPart]
    planned: Planned


@dataclass
class Spent:
    """Seconds of the DataLoader's run."""

    first_read: float = 0.0  # when
    decoding: float = 0.0  # in its other process
    encoding: float = 0.0


def run(size: str) -> dict[str, Any]:
    count = COUNTS[size]
    with tempfile.TemporaryDirectory(prefix="diffray-benchmark-") as name:
        folder = Path(name)
        write_folder(folder / "pictures", count, photograph)
        figures: dict[str, Any] = in_fresh_process(measure, folder)
    best = {}
    for name in ("diffray", "DataLoader"):
        best[name] = max(figures[name], key=lambda turn: turn["images_per_second"])
        print(
            f"{name:>10}: {best[name]['images_per_second']:6.1f} images a second from first to last file "
            f"(best of {TURNS}); {best[name]['startup_s']:.1f} s of start, then "
            f"{best[name]['first_file_s']:.1f} s to the first file, {best[name]['whole_s']:.1f} s in all",
            flush=True,
        )
    spent = best["DataLoader"]
    print(
        f"a picture of DataLoader's takes {spent['decode_ms']:.1f} ms to read and decode and "
        f"{spent['encode_ms']:.1f} ms to encode, which is {spent['encode_share']:.0%} of its encoder's time",
        flush=True,
    )
    ratio = best["diffray"]["images_per_second"] / best["DataLoader"]["images_per_second"]
    whole = best["DataLoader"]["whole_s"] / best["diffray"]["whole_s"]
    print(
        f"ratio: {ratio:.2f} of DataLoader's images a second ({whole:.2f} with the start), "
        f"{count:,} pictures, the same rows written",
        flush=True,
    )
    return {
        "pictures": count,
        "decoders": DECODERS,
        "encoders": 1,
        **figures,
        "ratio": ratio,
        "whole_ratio": whole,
    }


def measure(folder: Path) -> dict[str, Any]:
    """Both in turn, each encoding all pictures in `folder` anew."""
    import ray.data

    config = configured(folder / "pictures", folder / "runs", "data.cleaning.duplicates=ignore")
    storage = Storage.open(config.storage).child(config.name, "dataset")
    found: dict[str, Any] = {"diffray": [], "DataLoader": [], "batch_size": config.data.encode_batch_size}
    with local_cluster(LocalConfig(num_cpus=4)) as cluster, joined(cluster.gcs_address):
        sources = open_sources(config)
        entries, decisions = examine(config, sources, storage)
        square = (config.data.resolution, config.data.resolution)
        planner = Planner.of(config, decisions, [square])
        chunked = list(chunks(entries, decisions))
        parts = [part for chunk in chunked for part in planner.parts(chunk)]
        work = Work(config, sources, entries, parts, Planned(planner, chunked))
        options = ray.data.DataContext.get_current().execution_options
        options.resource_limits = options.resource_limits.copy(cpu=CPUS)
        # Nothing is read before the encoder is loaded: else much would be decoded before the clock starts.
        ray.data.DataContext.get_current().wait_for_min_actors_s = 600
        for turn in range(TURNS):
            ours, rival = (Storage.open(f"{folder}/{name}-{turn}") for name in ("ours", "rival"))
            found["diffray"].append(stream(work, ours))
            found["DataLoader"].append(load(work, rival))
            _require_same(work, ours, rival)
    return found


def _figures(work: Work, cache: Storage, started: float, reading: float) -> dict[str, float]:
    """The rate between the first and the last file written, when both run at their full speed; the start
    apart."""
    files = sorted((Path(cache.path, part.file).stat().st_mtime, len(part.rows)) for part in work.parts)
    (first, rows), (written, _) = files[0], files[-1]
    count = sum(len(part.rows) for part in work.parts)
    return {
        "images_per_second": (count - rows) / (written - first),
        "first_file_s": first - reading,
        "startup_s": reading - started,
        "whole_s": written - started,
    }


@dataclass(frozen=True)
class Watched(Source):
    """A source that notes when it was first read.

    Attributes:
        first_read: a file that is written then.
    """

    source: Source
    first_read: Path

    def _read(self, piece: Piece, wanted: Container[int] | None = None) -> Iterator[Sample]:
        if not self.first_read.exists():
            self.first_read.touch()
        return self.source.read(piece, wanted)


def stream(work: Work, cache: Storage) -> dict[str, float]:
    """The product's pipeline."""
    first_read = Path(f"{cache.path}-first-read")
    watched = [Watched(each.name, each.num_rows, [], each, first_read) for each in work.sources]
    started = time.time()
    outlines = [part.outline() for part in work.parts]
    encode_parts(work.config, watched, work.entries, work.planned, outlines, cache, lambda done, whole: None)
    return _figures(work, cache, started, first_read.stat().st_mtime)


class Decoded(TorchDataset[dict[str, Any]]):
    """Pictures of parts, decoded, by their place among all rows."""

    def __init__(self, work: Work, folder: Path) -> None:
        self.config = work.config.data
        self.rows = []
        for part in work.parts:
            for entry, row, scored in zip(part.entries, part.rows, part.scored, strict=True):
                [listed] = work.entries[entry].piece.rows.slice(row, 1).to_pylist()
                self.rows.append((folder / listed["file_name"], listed["text"], part.bucket, scored))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        start = time.time()
        path, text, bucket, scored = self.rows[index]
        data = path.read_bytes()
        picture = read_picture(
            data,
            background=self.config.background,
            max_pixels=self.config.cleaning.max_pixels,
            at_least=2 * max(bucket),
        )
        fitted = fit(picture.image, bucket, original=(picture.width, picture.height))
        return {
            "digest": content_digest(data),
            "text": text,
            "pixels": fitted.pixels,
            "image": encode_png(fitted.pixels) if scored else b"",
            "conditioning": [*fitted.original_size, *fitted.crop, *fitted.target_size],
            "times": (start, time.time()),
        }


def _stack(rows: list[dict[str, Any]]) -> dict[str, Any]:
    batch = {name: [row[name] for row in rows] for name in rows[0]}
    return batch | {"pixels": np.stack(batch["pixels"])}


def load(work: Work, cache: Storage) -> dict[str, float]:
    """The rival: a DataLoader decodes, this process encodes and writes the files of the same parts."""
    config, spent, started = work.config, Spent(), time.time()
    data = config.data
    encoder = EncodeRows(config)
    batches, first = [], 0
    for part in work.parts:
        last = first + len(part.rows)
        batches += [
            list(range(start, min(start + data.encode_batch_size, last)))
            for start in range(first, last, data.encode_batch_size)
        ]
        first = last
    loader = DataLoader(
        Decoded(work, Path(str(data.source))),
        batch_sampler=batches,
        num_workers=DECODERS,
        collate_fn=_stack,
    )
    decoded = iter(loader)
    for part in work.parts:
        tables = []
        for _ in range(0, len(part.rows), data.encode_batch_size):
            tables.append(_encode(encoder, next(decoded), spent))
        keys = pa.array(part.keys, pa.binary(16))
        table = pa.concat_tables(tables).combine_chunks().add_column(0, pa.field("key", keys.type), keys)
        with cache.filesystem.open_output_stream(_created(cache, part.file)) as file:
            pq.write_table(table, file, compression="none", use_dictionary=False, row_group_size=len(table))
    figures = _figures(work, cache, started, spent.first_read)
    count = sum(len(batch) for batch in batches)
    return figures | {
        "decode_ms": 1e3 * spent.decoding / count,
        "encode_ms": 1e3 * spent.encoding / count,
        "encode_share": spent.encoding / (figures["whole_s"] - figures["startup_s"]),
    }


def _created(cache: Storage, file: str) -> str:
    cache.filesystem.create_dir(cache.path)
    return f"{cache.path}/{file}"


def _encode(encoder: EncodeRows, batch: dict[str, Any], spent: Spent) -> pa.Table:
    """A batch's rows as the product stores them, but their keys."""
    start = time.perf_counter()
    tensors = encoder.encode(batch["pixels"], batch["text"])
    spent.encoding += time.perf_counter() - start
    spent.first_read = spent.first_read or batch["times"][0][0]
    spent.decoding += sum(end - begin for begin, end in batch["times"])
    columns: list[tuple[pa.Field, pa.Array]] = [
        (pa.field("digest", pa.string()), pa.array(batch["digest"])),
        (pa.field("text", pa.string()), pa.array(batch["text"])),
        (pa.field("image", pa.binary()), pa.array(batch["image"], pa.binary())),
        (
            pa.field("conditioning", pa.list_(pa.int32(), 6)),
            pa.array(batch["conditioning"], pa.list_(pa.int32(), 6)),
        ),
    ]
    columns += [tensor_column(name, tensor) for name, tensor in tensors.items()]
    return pa.Table.from_arrays([c for _, c in columns], schema=pa.schema([f for f, _ in columns]))


def _require_same(work: Work, ours: Storage, rival: Storage) -> None:
    """Else the two did not do the same work."""
    for part in work.parts:
        one, other = (
            pq.read_table(f"{cache.path}/{part.file}", columns=list(SAME), filesystem=cache.filesystem)
            for cache in (ours, rival)
        )
        assert one.equals(other), f"{part.file} differs"
