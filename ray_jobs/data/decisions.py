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
from ray_jobs.data.cleaning import MEASURES, Measures, check, check_size, histogram
from ray_jobs.data.duplicates import Pairs, find_near_pairs
from ray_jobs.data.images import Rejected
from ray_jobs.data.scan import Entry, HashPart, read_index
from ray_jobs.data.splits import Shares, Split, fold_of, split_of, stratified_splits

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
        rejected: reason to count, of what cannot be used (duplicates are counted apart).
        duplicates: reason to count.
        histograms: measure to counts of `cleaning.MEASURES`' bins.
        num_captions: different captions of kept rows.
        details: of rows that a threshold sets aside, the number and the threshold.
    """

    counts: np.ndarray  # rows of each index file
    reasons: np.ndarray
    matched: np.ndarray
    splits: np.ndarray
    folds: np.ndarray
    held_out: bool
    rejected: dict[str, int]
    duplicates: dict[str, int]
    histograms: dict[str, np.ndarray]
    num_captions: int
    details: dict[int, str]


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


def decide(config: Config, entries: Sequence[Entry], index: Storage, dataset: Storage) -> Decisions:
    """Find duplicates and assign splits and folds. The driver holds some 200 bytes a row."""
    data = config.data
    files = [entry.file for entry in entries]
    counts, columns, histograms, details = _read_columns(index, files, data.cleaning)
    reasons = columns["reason"]
    rejected = Counter(reason for reason in reasons if reason)
    usable = (reasons == "") & (columns["role"] == "instance")

    # A file that is listed with several captions is one picture with several rows.
    rows = np.flatnonzero(usable)
    digests, first, number = np.unique(columns["digest"][rows], return_index=True, return_inverse=True)
    in_order = np.argsort(first)
    rank = np.empty_like(in_order)
    rank[in_order] = np.arange(len(in_order))
    digests, first, number = digests[in_order], rows[first[in_order]], rank[number]
    matched = np.full(len(reasons), -1)
    if data.cleaning.duplicates == "drop":
        _, kept_first, copy = np.unique(
            np.stack([number, columns["text_hash"][rows]]), axis=1, return_index=True, return_inverse=True
        )
        is_copy = kept_first[copy] != np.arange(len(rows))
        reasons[rows[is_copy]] = "duplicate"
        matched[rows[is_copy]] = rows[kept_first[copy[is_copy]]]

    shares = Shares(data.split_seed, data.validation, data.test)
    known = _known_splits(config, dataset)
    own = _own_splits(digests, columns["stratum"][first], shares, known, stratified=bool(data.stratify))
    resolution = Resolution(np.ones(len(digests), bool), own, np.full(len(digests), -1))
    if data.cleaning.duplicates != "ignore" and len(digests) > 1:
        resolution = _resolve(config, index, files, counts, digests, first, own, known)

    reason = "near_duplicate" if data.cleaning.duplicates == "drop" else "near_duplicate_across_splits"
    dropped = rows[~resolution.kept[number]]
    reasons[dropped] = np.where(reasons[dropped] == "", reason, reasons[dropped])
    pairs = resolution.matched[number]
    paired = (matched[rows] < 0) & (pairs >= 0)
    matched[rows[paired]] = first[pairs[paired]]

    splits = np.full(len(reasons), "class", object)
    splits[rows] = resolution.split[number]
    held_out = int(resolution.kept.sum()) >= HOLD_OUT_FROM and data.validation > 0 and data.test > 0
    if held_out:
        _remember(config, dataset, digests, resolution)
    else:
        splits[rows] = "train"
    roots = _roots(resolution)
    folds = np.zeros(len(reasons), np.int16)
    if data.folds:
        of_picture = np.array(
            [fold_of(digests[root].decode(), data.split_seed, data.folds) for root in roots], np.int16
        )
        folds[rows] = np.where(splits[rows] == "test", 0, of_picture[number])
    duplicates = Counter(r for r in reasons[rows] if r)
    captions = len(np.unique(columns["text_hash"][reasons == ""]))
    return Decisions(
        counts,
        reasons,
        matched,
        splits,
        folds,
        held_out,
        dict(rejected),
        dict(duplicates),
        histograms,
        captions,
        details,
    )


def _read_columns(
    index: Storage, files: Sequence[str], cleaning: CleaningConfig
) -> tuple[np.ndarray, dict[str, np.ndarray], dict[str, np.ndarray], dict[int, str]]:
    """Rows a file, the columns that decisions need, the histograms of the measures, and the details of rows
    that a threshold sets aside."""
    names = ["digest", "reason", "role", "stratum", "text"]
    sizes = ["width", "height", *MEASURES]
    counts: list[int] = []
    details: dict[int, str] = {}
    found: dict[str, list[np.ndarray]] = {name: [] for name in (*names[:-1], "text_hash")}
    histograms = {name: histogram(name, np.empty(0)) for name in MEASURES}
    for table in read_index(index, files, [*names, *sizes]):
        reasons = table["reason"].to_pylist()
        for number, values in enumerate(zip(*(table[name].to_pylist() for name in sizes), strict=True)):
            if not reasons[number] and (fault := _fault(dict(zip(sizes, values, strict=True)), cleaning)):
                reasons[number], details[sum(counts) + number] = fault.reason, fault.detail
        counts.append(len(table))
        found["digest"].append(np.array(table["digest"].to_pylist(), "S64"))
        for name, values in (("reason", reasons), *((n, table[n].to_pylist()) for n in ("role", "stratum"))):
            found[name].append(np.array(list(map(sys.intern, values)), object))
        found["text_hash"].append(np.array([_short(text) for text in table["text"].to_pylist()], np.uint64))
        for name in MEASURES:
            values = table[name].drop_null().to_numpy()
            histograms[name] = histograms[name] + histogram(name, values)
    columns = {name: np.concatenate(parts) for name, parts in found.items()}
    return np.array(counts), columns, histograms, details


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


def _own_splits(
    digests: np.ndarray, strata: np.ndarray, shares: Shares, known: dict[str, Split], *, stratified: bool
) -> np.ndarray:
    """The split of every picture, whatever the others are."""
    names = [digest.decode() for digest in digests]
    if stratified:
        return np.array(stratified_splits(names, [str(s) for s in strata], shares, known), object)
    return np.array([split_of(digest, shares) for digest in names], object)


def _resolve(
    config: Config,
    index: Storage,
    files: Sequence[str],
    counts: np.ndarray,
    digests: np.ndarray,
    first: np.ndarray,
    own: np.ndarray,
    known: dict[str, Split],
) -> Resolution:
    """Settle near duplicates. Pictures that were assigned by an earlier run have the say over new ones."""
    cleaning = config.data.cleaning
    is_new = np.array([digest.decode() not in known for digest in digests])
    turn = np.argsort(is_new, kind="stable")
    place = np.empty_like(turn)
    place[turn] = np.arange(len(turn))
    ids = np.full(int(counts.sum()), -1)
    ids[first] = place
    ends = np.cumsum(counts)
    parts = []
    for start in range(0, len(files), FILES_A_HASH_PART):
        chosen = slice(start, start + FILES_A_HASH_PART)
        low, high = int(ends[start] - counts[start]), int(ends[chosen][-1])
        parts.append(HashPart(index, list(files[chosen]), ids[low:high]))
    pairs = find_near_pairs(parts, distance=cleaning.duplicate_distance, colour=cleaning.duplicate_colour)
    mode: Literal["drop", "keep"] = "drop" if cleaning.duplicates == "drop" else "keep"
    settled = np.array([known.get(d.decode(), s) for d, s in zip(digests, own, strict=True)], object)
    found = resolve(len(digests), pairs, mode, settled[turn])
    matched = found.matched[place]
    matched = np.where(matched >= 0, turn[matched], -1)
    return Resolution(found.kept[place], found.split[place], matched)


def _roots(resolution: Resolution) -> np.ndarray:
    """Of each picture the one that its group began with, so that a group stays in one fold."""
    roots = np.arange(len(resolution.kept))
    for picture in np.flatnonzero(resolution.matched >= 0):
        while resolution.matched[roots[picture]] >= 0:
            roots[picture] = resolution.matched[roots[picture]]
    return roots


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
