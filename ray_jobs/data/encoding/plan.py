"""Plan the encoding of a dataset from its index: kept pictures, their splits, and the parts.

A part is a run of rows of one split, fold and bucket that is encoded and stored as one file. Parts do not
span chunks (runs of consecutive pieces of a source), so that every piece is read once, and appending pictures
to a source leaves the earlier parts unchanged. A chunk is planned where its rows are read; of all parts, only
outlines are collected.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NotRequired, TypedDict

import numpy as np
import pyarrow as pa

from ray_jobs.config import Config
from ray_jobs.data.curation.decisions import Decisions
from ray_jobs.data.curation.labels import Labels
from ray_jobs.data.curation.rows import Rows, hex_digests, labelled
from ray_jobs.data.curation.scan import Entry
from ray_jobs.data.curation.splits import Shares, are_floor_candidates
from ray_jobs.data.encoding.geometry import Size, nearest_bucket
from ray_jobs.data.encoding.row_keys import RowKeys

ROWS_A_CHUNK = 2048
MAX_ROWS_A_PART = 128
PIXELS_A_PART = 64 << 20  # maximum bytes of a part's decoded pictures

_Group = tuple[str, int, Size, str | None]  # split, fold, bucket, value of data.balance


class PartRecord(TypedDict):
    """A part in the dataset's list of parts.

    Attributes:
        bucket: width x height.
        value: with `data.balance`, the value of that column in all its rows, which only parts for training
            have in common.
    """

    split: str
    fold: int
    source: int
    bucket: str
    rows: int
    file: str
    value: NotRequired[str]


@dataclass(frozen=True)
class PartOutline:
    """A part without its rows.

    Attributes:
        chunk: number of the run of pieces.
        bucket: width and height in pixels.
        file: file name in the encoding cache.
        num_rows: number of rows.
        num_pictures: number of rows without those of further augmentation variants.
        value: value of `data.balance` in all rows; None without it.
    """

    split: str
    fold: int
    source: int
    chunk: int
    bucket: Size
    file: str
    num_rows: int
    num_pictures: int
    value: str | None

    def record(self) -> PartRecord:
        """Return the part's record in the dataset's list of parts."""
        record: PartRecord = {
            "split": self.split,
            "fold": self.fold,
            "source": self.source,
            "bucket": f"{self.bucket[0]}x{self.bucket[1]}",
            "rows": self.num_rows,
            "file": self.file,
        }
        if self.value is not None:
            record["value"] = self.value
        return record


@dataclass(frozen=True)
class PlannedPart:
    """Rows that are encoded together into one file.

    Attributes:
        chunk: number of the run of pieces.
        bucket: width and height in pixels.
        entries, rows: entry number of each row, and its number within that piece.
        variants: augmentation variant of each row.
        scored: True for rows whose picture is kept for scores.
        digests, keys: picture digest and key of each row; the key is the hash of everything that its encoding
            depends on.
        file: file name in the encoding cache.
        texts: caption of each row, where they may be others than the source's own; None where they are not.
        value: value of `data.balance` in all rows; None without it.
        reference_size: width and height of the reference pictures in pixels; None without references.
        has_masks: True if the last of each row's further pictures is a mask.
        brings_control: True if a control image is the last one of these, or the one before the mask.
        further: digests of the files of each row's references, its control image, and its mask.
    """

    split: str
    fold: int
    source: int
    chunk: int
    bucket: Size
    entries: np.ndarray
    rows: np.ndarray
    variants: np.ndarray
    scored: np.ndarray
    digests: list[str]
    keys: list[bytes]
    file: str
    texts: list[str] | None = None
    value: str | None = None
    reference_size: Size | None = None
    has_masks: bool = False
    further: list[tuple[str, ...]] | None = None
    brings_control: bool = False

    def outline(self) -> PartOutline:
        """Return the part without its rows."""
        return PartOutline(
            self.split,
            self.fold,
            self.source,
            self.chunk,
            self.bucket,
            self.file,
            len(self.rows),
            int((self.variants == 0).sum()),
            self.value,
        )

    def record(self) -> PartRecord:
        """Return the part's record in the dataset's list of parts."""
        return self.outline().record()


@dataclass(frozen=True)
class Chunk:
    """Consecutive pieces of a source that are planned together, and the decisions on their rows.

    Attributes:
        number: number of the chunk.
        source: number of the source.
        entry: number of its first entry.
        counts: rows of each of its pieces.
        low: first row, of all rows.
        kept, splits, folds: see `Decisions`.
    """

    number: int
    source: int
    entry: int
    counts: np.ndarray
    low: int
    kept: np.ndarray
    splits: Labels
    folds: np.ndarray


def chunks(entries: Sequence[Entry], decisions: Decisions) -> Iterator[Chunk]:
    """Yield the chunks of a dataset, in source order."""
    kept, counts = decisions.kept, decisions.counts
    number, first, low, rows = 0, 0, 0, 0
    for last, entry in enumerate(entries):
        rows += int(counts[last])
        at_end = last + 1 == len(entries) or entries[last + 1].source != entry.source
        if rows >= ROWS_A_CHUNK or at_end:
            inside = slice(low, low + rows)
            yield Chunk(
                number,
                entry.source,
                first,
                counts[first : last + 1],
                low,
                kept[inside],
                decisions.splits.at(inside),
                decisions.folds[inside],
            )
            number, first, low, rows = number + 1, last + 1, low + rows, 0


@dataclass(frozen=True)
class Planner:
    """Plans the parts of chunks, in any process.

    Attributes:
        rows: rows of the dataset.
        held_out: see `Decisions`.
        keys: keys of rows.
        buckets: shapes of pictures.
        reference_sizes: shape of the reference pictures of each bucket; None without references.
    """

    config: Config
    rows: Rows
    held_out: bool
    keys: RowKeys
    buckets: Sequence[Size]
    reference_sizes: Mapping[Size, Size] | None = None

    @staticmethod
    def of(
        config: Config,
        decisions: Decisions,
        buckets: Sequence[Size],
        reference_sizes: Mapping[Size, Size] | None = None,
    ) -> "Planner":
        rows, keys = decisions.rows.for_tasks(), RowKeys(config).settled()
        return Planner(config, rows, decisions.held_out, keys, buckets, reference_sizes)

    def parts(self, chunk: Chunk) -> Iterator[PlannedPart]:
        """Yield the parts of a chunk."""
        chosen = np.flatnonzero(chunk.kept)
        if not len(chosen):
            return
        data = self.config.data
        columns = ["row", "text", "digest", "width", "height", "stratum"]
        columns += ["further"] if data.all_sources[0].further_columns else []
        high = chunk.low + len(chunk.kept)
        rows = _Rows(self.rows.read(chunk.low, high, columns).take(pa.array(chosen)), chunk, chosen)
        splits = np.array(rows.splits, object)
        scored = np.isin(splits, ("validation", "test")) | (not self.held_out)
        training = np.flatnonzero((splits == "train") & ~scored)
        shares = Shares(data.split_seed, data.validation, data.test)
        digests = [rows.digests[n].encode() for n in training.tolist()]
        scored[training] = are_floor_candidates(digests, shares)
        for group, inside in self._groups(rows, scored).items():
            yield from self._cut(chunk, group, inside, rows, scored)

    def _groups(self, rows: "_Rows", scored: np.ndarray) -> dict[_Group, list[int]]:
        """Return the rows of each group, both in the order of rows."""
        data, groups = self.config.data, dict[_Group, list[int]]()
        buckets = {size: self._bucket(size) for size in set(rows.sizes)}
        streams = data.encode == "stream"
        shown = scored.tolist()
        for number, (split, fold, size) in enumerate(zip(rows.splits, rows.folds, rows.sizes, strict=True)):
            value, bucket = None, buckets[size]
            if data.balance:  # rounds of cross-validation train on the pictures of both
                value = rows.strata[number] if split in ("train", "validation") else ""
            groups.setdefault((split, fold, bucket, value), []).append(number)
            if streams and split == "train" and shown[number]:
                groups.setdefault(("floor", fold, bucket, value and ""), []).append(number)
        return groups

    def _bucket(self, size: Size) -> Size:
        return nearest_bucket(size, self.buckets) if len(self.buckets) > 1 else self.buckets[0]

    def _cut(
        self, chunk: Chunk, group: _Group, inside: list[int], rows: "_Rows", scored: np.ndarray
    ) -> Iterator[PlannedPart]:
        """Yield the parts of a group of a chunk's rows."""
        split, fold, bucket, value = group
        data, each = self.config.data, self.config.data.augmentation.variants if split == "train" else 1
        numbers = np.repeat(inside, each)
        variants = np.tile(np.arange(each, dtype=np.int16), len(inside))
        shown = (scored[numbers] | (split == "floor")) & (variants == 0)
        size = self.reference_sizes[bucket] if self.reference_sizes else None
        pixels = bucket[0] * bucket[1] * (1 + data.has_control)
        if size:
            pixels += size[0] * size[1] * len(rows.further[inside[0]])
        limit = min(MAX_ROWS_A_PART, max(8, PIXELS_A_PART // (3 * pixels)))
        for start in range(0, len(numbers), limit):
            part = slice(start, start + limit)
            some = numbers[part].tolist()
            drawn = zip(some, variants[part].tolist(), shown[part].tolist(), strict=True)
            keys = [
                self.keys.key(rows.digests[n], rows.texts[n], bucket, variant, split, show, rows.further[n])
                for n, variant, show in drawn
            ]
            yield PlannedPart(
                split,
                fold,
                chunk.source,
                chunk.number,
                bucket,
                rows.entries[numbers[part]],
                rows.numbers[numbers[part]],
                variants[part],
                shown[part],
                [rows.digests[n] for n in some],
                keys,
                hashlib.sha256(b"".join(keys)).hexdigest()[:32] + ".parquet",
                [rows.texts[n] for n in some] if data.captioning.model is not None else None,
                value,
                size,
                data.has_masks,
                [rows.further[n] for n in some] if rows.further[some[0]] else None,
                data.brings_control,
            )


class _Rows:
    """Kept rows of a chunk, by column."""

    def __init__(self, table: pa.Table, chunk: Chunk, chosen: np.ndarray) -> None:
        of_entry = np.repeat(np.arange(len(chunk.counts), dtype=np.int32), chunk.counts)
        self.entries = chunk.entry + of_entry[chosen]
        self.numbers = table["row"].to_numpy().astype(np.int32)
        self.splits = chunk.splits.at(chosen).tolist()
        self.folds = chunk.folds[chosen].tolist()
        self.sizes = list(zip(table["width"].to_pylist(), table["height"].to_pylist(), strict=True))
        self.digests, self.texts = hex_digests(table), table["text"].to_pylist()
        codes, names = labelled(table["stratum"])
        self.strata = [names[code] for code in codes.tolist()]
        self.further: list[tuple[str, ...]] = [()] * len(table)
        if "further" in table.column_names:
            self.further = [tuple(digests or ()) for digests in table["further"].to_pylist()]


def plan_parts(
    config: Config,
    entries: Sequence[Entry],
    decisions: Decisions,
    buckets: Sequence[Size],
    reference_sizes: Mapping[Size, Size] | None = None,
) -> Iterator[PlannedPart]:
    """Yield the parts of all kept rows, chunk by chunk in source order, in this process."""
    planner = Planner.of(config, decisions, buckets, reference_sizes)
    return (part for chunk in chunks(entries, decisions) for part in planner.parts(chunk))
