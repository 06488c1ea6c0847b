"""Plan the encoding of a dataset from its index: kept pictures, their splits, and the parts.

A part is a run of rows of one split, fold and bucket that is encoded and stored as one file. Parts do not
span chunks (runs of consecutive pieces of a source), so that every piece is read once, and appending pictures
to a source leaves the earlier parts unchanged.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NotRequired, TypedDict

import numpy as np

from cluster.fetched import local_path
from cluster.storage import Storage
from ray_jobs.config import Config, DataConfig, Effect
from ray_jobs.data.curation.decisions import Decisions
from ray_jobs.data.curation.scan import Entry, read_index
from ray_jobs.data.curation.splits import Shares, is_floor_candidate
from ray_jobs.data.encoding.geometry import Size, nearest_bucket
from ray_jobs.data.encoding.shapes import painter
from ray_jobs.weights.model_files import family_in

ROWS_A_CHUNK = 2048
MAX_ROWS_A_PART = 128
PIXELS_A_PART = 64 << 20  # maximum bytes of a part's decoded pictures
VERSION = 3  # version of an encoding's dependencies; a change encodes anew

# Entry, row in it, variant, is scored, digest, key, text, digests of further pictures.
_Row = tuple[int, int, int, bool, str, bytes, str, tuple[str, ...]]
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

    def record(self) -> PartRecord:
        """Return the part's record in the dataset's list of parts."""
        record: PartRecord = {
            "split": self.split,
            "fold": self.fold,
            "source": self.source,
            "bucket": f"{self.bucket[0]}x{self.bucket[1]}",
            "rows": len(self.rows),
            "file": self.file,
        }
        if self.value is not None:
            record["value"] = self.value
        return record


def plan_parts(
    config: Config,
    entries: Sequence[Entry],
    index: Storage,
    decisions: Decisions,
    buckets: Sequence[Size],
    reference_sizes: Mapping[Size, Size] | None = None,
) -> Iterator[PlannedPart]:
    """Yield the parts of all kept rows, chunk by chunk in source order.

    Args:
        buckets: shapes of pictures.
        reference_sizes: shape of the reference pictures of each bucket; None without references.
    """
    data, keys = config.data, RowKeys(config)
    shares = Shares(data.split_seed, data.validation, data.test)
    columns = ["row", "text", "digest", "width", "height", "stratum"]
    columns += ["further"] if data.all_sources[0].further_columns else []
    tables = read_index(index, [entry.file for entry in entries], columns)
    groups: dict[_Group, list[_Row]] = {}
    row, chunk, in_chunk = 0, 0, 0
    for number, (entry, table) in enumerate(zip(entries, tables, strict=True)):
        values = zip(*(table[column].to_pylist() for column in columns), strict=True)
        for name, text, digest, width, height, stratum, *others in values:
            further = tuple(others[0] or ()) if others else ()
            split = decisions.splits[row]
            if not decisions.reasons[row]:
                bucket = nearest_bucket((width, height), buckets) if len(buckets) > 1 else buckets[0]
                scored = split in ("validation", "test") or not decisions.held_out
                scored = scored or (split == "train" and is_floor_candidate(digest, shares))
                # Rounds of cross-validation train on the pictures of both.
                value = (stratum if split in ("train", "validation") else "") if data.balance else None
                group = groups.setdefault((split, int(decisions.folds[row]), bucket, value), [])
                for variant in range(data.augmentation.variants if split == "train" else 1):
                    shown = scored and variant == 0
                    key = keys.key(digest, text, bucket, variant, split, shown, further)
                    group.append((number, name, variant, shown, digest, key, text, further))
                if data.encode == "stream" and split == "train" and scored:
                    key = keys.key(digest, text, bucket, 0, "floor", True, further)
                    floor = groups.setdefault(("floor", int(decisions.folds[row]), bucket, value and ""), [])
                    floor.append((number, name, 0, True, digest, key, text, further))
            row += 1
        in_chunk += len(table)
        last = number + 1 == len(entries)
        if last or in_chunk >= ROWS_A_CHUNK or entries[number + 1].source != entry.source:
            yield from _cut(groups, entry.source, chunk, data, reference_sizes)
            groups, in_chunk, chunk = {}, 0, chunk + 1


def _cut(
    groups: dict[_Group, list[_Row]],
    source: int,
    chunk: int,
    data: DataConfig,
    reference_sizes: Mapping[Size, Size] | None,
) -> Iterator[PlannedPart]:
    for (split, fold, bucket, value), group in groups.items():
        size = reference_sizes[bucket] if reference_sizes else None
        pixels = bucket[0] * bucket[1] * (1 + data.has_control)
        if size:
            pixels += size[0] * size[1] * len(group[0][-1])
        limit = min(MAX_ROWS_A_PART, max(8, PIXELS_A_PART // (3 * pixels)))
        for start in range(0, len(group), limit):
            numbers, rows, variants, scored, digests, keys, texts, further = zip(
                *group[start : start + limit], strict=True
            )
            name = hashlib.sha256(b"".join(keys)).hexdigest()[:32]
            yield PlannedPart(
                split,
                fold,
                source,
                chunk,
                bucket,
                np.array(numbers, np.int32),
                np.array(rows, np.int32),
                np.array(variants, np.int16),
                np.array(scored, bool),
                list(digests),
                list(keys),
                f"{name}.parquet",
                list(texts) if data.captioning.model is not None else None,
                value,
                size,
                data.has_masks,
                list(further) if further[0] else None,
                data.brings_control,
            )


class RowKeys:
    """Keys of rows: 16-byte hashes of everything that an encoding depends on, except the encoders.

    The encoders' digest names the cache's folder.
    """

    def __init__(self, config: Config) -> None:
        settings = config.data.affecting(Effect.ENCODINGS)
        self.augmentation, self.seed = settings.pop("augmentation"), config.seed
        self.is_augmented = config.data.augmentation.is_active
        self.settings = list(settings.values())
        self.config = config

    @cached_property
    def _stored(self) -> list[object]:
        """What is stored of further pictures: models with the same encoders share the cache."""
        data, model = self.config.data, self.config.model
        stored: list[object] = [data.num_references, data.has_masks, painter(self.config) is not None]
        stored += ["control", self._control_form] if data.brings_control else []
        family = family_in(local_path(model.base), revision=model.revision)
        return [*stored, family.pipeline_class] if family.text.sees_references else stored

    @cached_property
    def _computed(self) -> list[object]:
        """What control images that are computed depend on beside the settings."""
        from ray_jobs.weights.conditioner import VERSION, conditioner_digest  # imports PyTorch

        data = self.config.data
        if data.brings_control or not data.has_control:
            return []
        return ["computed control", self._control_form, VERSION, conditioner_digest(data.control)]

    @property
    def _control_form(self) -> str | None:
        """What the model's ControlNets look at."""
        model = self.config.model
        control = family_in(local_path(model.base), revision=model.revision).control
        return control.form if control else None

    def key(
        self,
        digest: str,
        text: str,
        bucket: Size,
        variant: int,
        split: str,
        shown: bool,
        further: tuple[str, ...] = (),
    ) -> bytes:
        """Return the key of a row of a split."""
        depends: list[object] = [VERSION, digest, text, bucket, *self.settings, shown, *further]
        depends += self._stored if further else []
        depends += self._computed
        if split == "train" and self.is_augmented:
            depends += [self.seed, variant, self.augmentation]
        return hashlib.sha256(json.dumps(depends).encode()).digest()[:16]
