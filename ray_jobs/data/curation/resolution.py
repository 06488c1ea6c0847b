"""Decisions on near duplicates: which picture of several is kept, and whose split it has."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa

from ray_jobs.config import CleaningConfig
from ray_jobs.data.curation.duplicates import Pairs, Pictures, find_near_pairs, search_all
from ray_jobs.data.curation.rows import Rows, fixed_bytes
from ray_jobs.data.curation.workers import InProcess, Workers


@dataclass(frozen=True)
class Resolution:
    """Decision on each of N pictures.

    A picture that is not kept was dropped (mode drop), or its near duplicates are in several splits (mode
    keep: `near_duplicate_across_splits`).
    """

    kept: np.ndarray  # bool, N
    split: np.ndarray  # N: of kept pictures, in the type of `own_split`
    matched: np.ndarray  # int64, N: the first earlier kept near duplicate, which decided; -1: none


def resolve(
    num: int, pairs: Pairs, mode: Literal["drop", "keep"], own_split: Sequence[str] | np.ndarray
) -> Resolution:
    """Decide on each picture by its earlier kept near duplicates alone, so that later ones change nothing.

    drop: a picture with such duplicates is dropped, so that no two kept ones are near duplicates. keep: it
    takes their split; if they are in several, it is rejected, so that no near duplicates are in two splits.

    Args:
        num: number of pictures.
        pairs: their near duplicates, by position in 0..num-1.
        mode: mode, as in `data.cleaning.duplicates`.
        own_split: split of each picture without earlier near duplicates.
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


def connected(num: int, edges: np.ndarray) -> np.ndarray:
    """Smallest member of each node's connected component: int64, num.

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


@dataclass(frozen=True)
class Alike:
    """Decisions on the pictures that have near duplicates; all others are kept as they are.

    Attributes:
        rows: first row of each of these pictures, ascending by precedence: int64, N.
        kept, split: see `Resolution`.
        matched: first row of the picture that decided; -1: none.
        group: first row of the picture that stands for all that are connected: int64, N.
    """

    rows: np.ndarray
    kept: np.ndarray
    split: np.ndarray
    matched: np.ndarray
    group: np.ndarray


def resolve_alike(
    rows: Rows,
    first: np.ndarray,
    known: np.ndarray,
    own_split: np.ndarray,
    cleaning: CleaningConfig,
    workers: Workers,
) -> Alike:
    """Find the near duplicates among pictures, and decide on them.

    Pictures assigned by an earlier run take precedence over new ones.

    Args:
        first: bool, one per row: whether it is the first row of a picture.
        known: bool, one per row: whether an earlier run assigned its picture.
        own_split: uint8, one per row: split of its picture without regard to near duplicates.

    Raises:
        ConfigError: there are too many to compare.
    """
    total, none = len(rows), np.empty(0, np.int64)
    if cleaning.duplicates == "ignore" or np.count_nonzero(first) < 2:
        return Alike(none, none.astype(bool), none.astype(np.uint8), none, none)
    light = rows.for_tasks()
    parts = [
        _Hashes(light, run.low, run.high, first[run.low : run.high], known[run.low : run.high])
        for run in rows.runs
    ]
    distance, colour = cleaning.duplicate_distance, cleaning.duplicate_colour
    if isinstance(workers, InProcess):
        pairs = search_all(distance, colour, *(part() for part in parts))
    else:
        pairs = find_near_pairs(parts, distance=distance, colour=colour)
    ids = np.unique(np.concatenate([pairs.near.ravel(), pairs.copies.ravel()]))
    near, copies = (np.searchsorted(ids, each) for each in (pairs.near, pairs.copies))
    of = ids % total  # see `_Hashes`
    found = resolve(len(ids), Pairs(near, copies), cleaning.duplicates, own_split[of])
    matched = np.where(found.matched >= 0, of[found.matched], -1)
    group = of[connected(len(ids), np.concatenate([near, copies]))]
    return Alike(of, found.kept, found.split, matched, group)


@dataclass(frozen=True)
class _Hashes:
    """Hashes of the pictures in a run of rows, read in the task that deals or compares them.

    A picture's ID is its first row; that of a new one comes after those of all known ones.
    """

    rows: Rows
    low: int
    high: int
    first: np.ndarray
    known: np.ndarray

    def __call__(self) -> Pictures:
        places = np.flatnonzero(self.first)
        table = self.rows.read(self.low, self.high, ["hash", "colours"]).take(pa.array(places))
        colours = np.frombuffer(fixed_bytes(table["colours"], 48), np.uint8).reshape(-1, 48)
        ids = self.low + places + np.where(self.known[places], 0, len(self.rows))
        return Pictures(ids, table["hash"].to_numpy().astype(np.uint64), colours)
