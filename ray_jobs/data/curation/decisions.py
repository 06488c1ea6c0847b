"""What becomes of each picture of a set: which are kept, and in which split and fold."""

import hashlib
import io
import itertools
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster.storage import Storage
from ray_jobs.config import CleaningConfig, Config
from ray_jobs.data.curation.cleaning import MEASURES, Measures, check, check_size, histogram
from ray_jobs.data.curation.duplicates import Pairs, find_near_pairs
from ray_jobs.data.curation.scan import Entry, HashPart, read_index
from ray_jobs.data.curation.splits import Shares, Split, fold_of, split_of, stratified_splits
from ray_jobs.data.sources.samples import LEFT_OUT, read_suffix_text
from ray_jobs.pictures.reading import Rejected

FILES_A_HASH_PART = 256
HOLD_OUT_FROM = 20
"""Fewer pictures are not split: too few to hold any out. Scores then compare with the training pictures."""
ASSIGNED = "assigned.parquet"


@dataclass(frozen=True)
class Decisions:
    """What becomes of every row of the index, in the order of the index.

    Attributes:
        reasons: "" for kept rows, else why a row is set aside.
        matched: of duplicates, the earlier row that they are a duplicate of, which is kept; else -1.
        splits: of kept rows: train, validation, test, or class (prior preservation's pictures).
        folds: of kept rows.
        held_out: whether validation and test are other pictures than train.
        rejected: reason to count, of what cannot be used (duplicates are counted apart) of the user's own
            pictures: bad ones among those that the base model drew do not speak against the set.
        left_out: reason to count, of pictures of the user's sources that are no rows of the set (LEFT_OUT).
        no_pictures: suffix to count, of the files there that are no pictures.
        num_own: rows of the user's own sources, which are the first; those that are left out among them.
        duplicates: reason to count.
        histograms: measure to counts of `cleaning.MEASURES`' bins.
        num_captions: different captions of kept rows.
        num_repaired: kept rows whose captions were repaired.
        num_of_lines: kept rows whose captions have several lines in their source.
        details: of rows that a threshold sets aside, the number and the threshold.
    """

    counts: np.ndarray  # rows of each index file
    reasons: np.ndarray
    matched: np.ndarray
    splits: np.ndarray
    folds: np.ndarray
    held_out: bool
    rejected: dict[str, int]
    left_out: dict[str, int]
    no_pictures: dict[str, int]
    num_own: int
    duplicates: dict[str, int]
    histograms: dict[str, np.ndarray]
    num_captions: int
    num_repaired: int
    num_of_lines: int
    details: dict[int, str]

    @property
    def num_judged(self) -> int:
        """Rows of the user's own sources, without what is left out of the set."""
        return self.num_own - int(np.isin(self.reasons[: self.num_own], list(LEFT_OUT)).sum())


@dataclass(frozen=True)
class Resolution:
    """What becomes of each of N pictures.

    A picture that is not kept was dropped (mode drop), or its near duplicates lie in several splits (mode
    keep: `near_duplicate_across_splits`).
    """

    kept: np.ndarray  # bool, N
    split: np.ndarray  # N: of kept pictures, in the type of `own_split`
    matched: np.ndarray  # int64, N: the first earlier kept near duplicate, which decided; -1: none


def resolve(
    num: int, pairs: Pairs, mode: Literal["drop", "keep"], own_split: Sequence[str] | np.ndarray
) -> Resolution:
    """Decide on each picture by its earlier kept near duplicates alone, so that later ones change nothing.

    drop: a picture that has some is dropped, so that no two kept ones are near duplicates. keep: it takes
    their split; if they lie in several it is set aside, so that no near duplicates lie in two splits.

    Args:
        num: of pictures.
        pairs: their near duplicates, by position in 0..num-1.
        mode: as in `data.cleaning.duplicates`.
        own_split: the split of each where no near duplicate decides.
    """
    kept, matched, split = np.ones(num, bool), np.full(num, -1), np.array(own_split)
    earlier, later = pairs.near[np.lexsort(pairs.near.T)].T
    starts = np.flatnonzero(np.diff(later, prepend=-1))
    for start, end in itertools.pairwise([*starts, len(later)]):
        deciding = earlier[start:end][kept[earlier[start:end]]]
        if len(deciding) == 0:
            continue
        picture = later[start]
        matched[picture] = deciding[0]
        splits = split[deciding]
        kept[picture] = mode == "keep" and (splits == splits[0]).all()
        split[picture] = splits[0]
    # A copy's near duplicates are those of the first, and the first itself.
    first, copy = pairs.copies.T
    matched[copy] = np.where(matched[first] < 0, first, matched[first])
    kept[copy] = kept[first] & (mode == "keep")
    split[copy] = split[first]
    return Resolution(kept, split, matched)


@dataclass(frozen=True)
class _Pictures:
    """The different pictures of a set, in the order of its sources, and which rows show them.

    A file that is listed with several captions is one picture with several rows.
    """

    rows: np.ndarray  # int64: of the index, that can be used
    number: np.ndarray  # int64, one a row: its picture
    first: np.ndarray  # int64, one a picture: its first row
    digests: np.ndarray  # S64, one a picture

    @staticmethod
    def of(digests: np.ndarray, rows: np.ndarray) -> "_Pictures":
        different, first, number = np.unique(digests[rows], return_index=True, return_inverse=True)
        in_order = np.argsort(first)
        rank = np.empty_like(in_order)
        rank[in_order] = np.arange(len(in_order))
        return _Pictures(rows, rank[number], rows[first[in_order]], different[in_order])


def decide(config: Config, entries: Sequence[Entry], index: Storage, dataset: Storage) -> Decisions:
    """Find duplicates and assign splits and folds."""
    data = config.data
    files = [entry.file for entry in entries]
    counts, columns, histograms, details, no_pictures = _read_columns(index, files, data.cleaning)
    reasons = columns["reason"]
    of_user = [entry.source < len(data.all_sources) for entry in entries]
    num_own = int(counts[of_user].sum())
    rejected = Counter(reason for reason in reasons[:num_own] if reason)
    left_out = {reason: rejected.pop(reason) for reason in LEFT_OUT & rejected.keys()}
    left_out.pop("no_picture", None)
    usable = np.flatnonzero((reasons == "") & (columns["role"] == "instance"))
    pictures = _Pictures.of(columns["digest"], usable)
    strata = columns["stratum"][pictures.first]
    resolution, groups = _resolve(config, index, files, counts, pictures, strata, dataset)
    matched = _mark_duplicates(data.cleaning, pictures, columns["text_hash"], resolution, reasons)

    wanted = data.validation > 0 or data.test > 0
    held_out = wanted and int(resolution.kept.sum()) >= HOLD_OUT_FROM
    splits = np.full(len(reasons), "class", object)
    splits[pictures.rows] = resolution.split[pictures.number] if held_out else "train"
    if held_out:
        _remember(config, dataset, pictures.digests, resolution)
    folds = np.zeros(len(reasons), np.int16)
    if data.folds:
        names = [pictures.digests[group].decode() for group in groups]
        of_picture = np.array([fold_of(name, data.split_seed, data.folds) for name in names], np.int16)
        folds[pictures.rows] = of_picture[pictures.number]
        folds[splits == "test"] = 0
    return Decisions(
        counts=counts,
        reasons=reasons,
        matched=matched,
        splits=splits,
        folds=folds,
        held_out=held_out,
        rejected=dict(rejected),
        left_out=left_out,
        no_pictures=dict(no_pictures),
        num_own=num_own,
        duplicates=dict(Counter(reason for reason in reasons[pictures.rows] if reason)),
        histograms=histograms,
        num_captions=len(np.unique(columns["text_hash"][reasons == ""])),
        num_repaired=int(columns["repaired"][reasons == ""].sum()),
        num_of_lines=int((columns["lines"][reasons == ""] > 1).sum()),
        details=details,
    )


def _mark_duplicates(
    cleaning: CleaningConfig,
    pictures: _Pictures,
    text_hashes: np.ndarray,
    resolution: Resolution,
    reasons: np.ndarray,
) -> np.ndarray:
    """Write the reasons of rows that are set aside as duplicates; returns `Decisions.matched`."""
    rows, number = pictures.rows, pictures.number
    matched = np.full(len(reasons), -1)
    if cleaning.duplicates == "drop":  # the same picture with the same caption
        pairs = np.stack([number.astype(np.uint64), text_hashes[rows]])
        _, first, of = np.unique(pairs, axis=1, return_index=True, return_inverse=True)
        copies = np.flatnonzero(first[of] != np.arange(len(rows)))
        reasons[rows[copies]] = "duplicate"
        matched[rows[copies]] = rows[first[of[copies]]]
    reason = "near_duplicate" if cleaning.duplicates == "drop" else "near_duplicate_across_splits"
    dropped = rows[~resolution.kept[number]]
    reasons[dropped[reasons[dropped] == ""]] = reason
    twins = resolution.matched[number]
    paired = (matched[rows] < 0) & (twins >= 0)
    matched[rows[paired]] = pictures.first[twins[paired]]
    return matched


def _read_columns(
    index: Storage, files: Sequence[str], cleaning: CleaningConfig
) -> tuple[np.ndarray, dict[str, np.ndarray], dict[str, np.ndarray], dict[int, str], Counter[str]]:
    """Rows a file, the columns that decisions need, the histograms of the measures, the details of rows
    that a threshold sets aside, and the files that are no pictures, by suffix."""
    names = ["digest", "reason", "role", "stratum", "text"]
    no_pictures = Counter[str]()
    sizes = ["width", "height", *MEASURES]
    counts: list[int] = []
    details: dict[int, str] = {}
    start = 0
    found: dict[str, list[np.ndarray]] = {
        name: [] for name in (*names[:-1], "text_hash", "repaired", "lines")
    }
    histograms = {name: histogram(name, np.empty(0)) for name in MEASURES}
    for table in read_index(index, files, [*names, *sizes, "detail", "repaired", "lines"]):
        reasons = table["reason"].to_pylist()
        for number in (number for number, reason in enumerate(reasons) if reason == "no_picture"):
            no_pictures += read_suffix_text(table["detail"][number].as_py())
        for number, values in enumerate(zip(*(table[name].to_pylist() for name in sizes), strict=True)):
            if not reasons[number] and (fault := _fault(dict(zip(sizes, values, strict=True)), cleaning)):
                reasons[number], details[start + number] = fault.reason, fault.detail
        start += len(table)
        counts.append(len(table))
        found["repaired"].append(np.array(table["repaired"].to_pylist(), bool))
        found["lines"].append(table["lines"].to_numpy())
        found["digest"].append(np.array(table["digest"].to_pylist(), "S64"))
        for name, values in (("reason", reasons), *((n, table[n].to_pylist()) for n in ("role", "stratum"))):
            found[name].append(np.array(list(map(sys.intern, values)), object))
        found["text_hash"].append(np.array([_short(text) for text in table["text"].to_pylist()], np.uint64))
        for name in MEASURES:
            values = table[name].drop_null().to_numpy()
            histograms[name] = histograms[name] + histogram(name, values)
    columns = {name: np.concatenate(parts) for name, parts in found.items()}
    return np.array(counts), columns, histograms, details, no_pictures


def _fault(measured: dict[str, float], cleaning: CleaningConfig) -> Rejected | None:
    """What the thresholds say of a picture's size and measures."""
    measures = Measures(**measured, hash=0, colours=b"")  # type: ignore[arg-type]
    try:
        check_size(measures, cleaning)
        check(measures, cleaning)
    except Rejected as fault:
        return fault
    return None


def _short(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _own_splits(config: Config, names: list[str], strata: np.ndarray, known: dict[str, Split]) -> np.ndarray:
    """The split of every picture where no near duplicate decides."""
    data = config.data
    shares = Shares(data.split_seed, data.validation, data.test)
    if data.stratify:
        return np.array(stratified_splits(names, [str(s) for s in strata], shares, known), object)
    return np.array([known.get(name) or split_of(name, shares) for name in names], object)


def _resolve(
    config: Config,
    index: Storage,
    files: Sequence[str],
    counts: np.ndarray,
    pictures: _Pictures,
    strata: np.ndarray,
    dataset: Storage,
) -> tuple[Resolution, np.ndarray]:
    """Splits, near duplicates settled, and of each picture the first of its group. Pictures that an earlier
    run assigned have the say over new ones."""
    cleaning, num = config.data.cleaning, len(pictures.digests)
    known = _known_splits(config, dataset)
    names = [digest.decode() for digest in pictures.digests]
    own = _own_splits(config, names, strata, known)
    if cleaning.duplicates == "ignore" or num < 2:
        return Resolution(np.ones(num, bool), own, np.full(num, -1)), np.arange(num)
    turn = np.argsort([name not in known for name in names], kind="stable")
    place = np.empty_like(turn)
    place[turn] = np.arange(num)
    ids = np.full(int(counts.sum()), -1)
    ids[pictures.first] = place
    ends = np.cumsum(counts)
    parts = []
    for start in range(0, len(files), FILES_A_HASH_PART):
        chosen = slice(start, start + FILES_A_HASH_PART)
        low, high = int(ends[start] - counts[start]), int(ends[chosen][-1])
        parts.append(HashPart(index, list(files[chosen]), ids[low:high]))
    distance, colour = cleaning.duplicate_distance, cleaning.duplicate_colour
    pairs = find_near_pairs(parts, distance=distance, colour=colour)
    found = resolve(num, pairs, cleaning.duplicates, own[turn])
    matched = found.matched[place]
    matched = np.where(matched >= 0, turn[matched], -1)
    groups = turn[connected(num, np.concatenate([pairs.near, pairs.copies]))[place]]
    return Resolution(found.kept[place], found.split[place], matched), groups


def connected(num: int, edges: np.ndarray) -> np.ndarray:
    """The least member of each node's connected component: int64, num.

    Args:
        edges: int64, M x 2, nodes in 0..num-1.
    """
    least = np.arange(num)
    while True:
        before = least.copy()
        np.minimum.at(least, edges[:, 0], before[edges[:, 1]])
        np.minimum.at(least, edges[:, 1], before[edges[:, 0]])
        least = least[least]
        if (least == before).all():
            return least


def _split_settings(config: Config) -> str:
    data = config.data
    return json.dumps([data.split_seed, data.validation, data.test, data.stratify])


def _known_splits(config: Config, dataset: Storage) -> dict[str, Split]:
    """Digest to split, of the pictures that an earlier run with the same settings kept."""
    if not dataset.exists(ASSIGNED):
        return {}
    table = pq.read_table(io.BytesIO(dataset.read_bytes(ASSIGNED)))
    if table.schema.metadata[b"settings"].decode() != _split_settings(config):
        return {}
    return dict(zip(table["digest"].to_pylist(), table["split"].to_pylist(), strict=True))


def _remember(config: Config, dataset: Storage, digests: np.ndarray, resolution: Resolution) -> None:
    kept = resolution.kept
    table = pa.table({"digest": digests[kept].astype(str), "split": resolution.split[kept].astype(str)})
    buffer = io.BytesIO()
    pq.write_table(table.replace_schema_metadata({"settings": _split_settings(config)}), buffer)
    dataset.write_bytes(ASSIGNED, buffer.getvalue())
