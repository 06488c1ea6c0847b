"""First look at a run of rows: which can be used, by their measures, and what each decides by itself."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from cluster.storage import Storage
from ray_jobs.config import CleaningConfig, Config, DataConfig
from ray_jobs.data.curation.assigned import known_files, read_known
from ray_jobs.data.curation.cleaning import (
    QUALITY_CHECKS,
    ImageStats,
    check,
    check_size,
    histogram,
)
from ray_jobs.data.curation.copies import Block, Copies, deal, find_copies
from ray_jobs.data.curation.labels import Labels, joined
from ray_jobs.data.curation.rows import Rows, Run, digest_words, fixed_bytes, labelled
from ray_jobs.data.curation.splits import Shares, folds_of, splits_of
from ray_jobs.data.curation.workers import Workers
from ray_jobs.data.sources.samples import read_suffix_text
from ray_jobs.pictures.reading import Rejected

SIZES = ("width", "height", *QUALITY_CHECKS)
MEASURED = [*SIZES, "references"]
USABLE, REPAIRED, OF_LINES = 1, 2, 4  # bits of `Judged.flags`


@dataclass(frozen=True)
class Judged:
    """What the rows of a run are, without regard to others.

    Attributes:
        reasons: "" for rows that can be read and pass all thresholds, else the first reason against them.
        flags: uint8, bits of each row; USABLE is set for pictures of the user's without a reason.
        splits: uint8, number in SPLITS of each usable row.
        folds: int16, fold of each row by its own picture; empty without folds.
        strata: number of each row's stratum, and the strata; empty without `data.stratify`.
        histograms: counts in the bins of QUALITY_CHECKS, by measure.
        no_pictures: counts by suffix of files that are not pictures.
    """

    reasons: Labels
    flags: np.ndarray
    splits: np.ndarray
    folds: np.ndarray
    strata: tuple[np.ndarray, list[str]]
    histograms: dict[str, np.ndarray]
    no_pictures: Counter[str]


COLUMNS = ["reason", "detail", "role", "stratum", "digest", "text_hash", "repaired", "lines", *MEASURED]


@dataclass(frozen=True)
class Judge:
    """Judge a run, and deal its usable rows to the partitions in which equal pictures meet.

    A file of pictures known from an earlier run is dealt, and their number returned.
    """

    config: Config
    rows: Rows
    dataset: Storage
    num_partitions: int

    def __call__(self, item: Run | str) -> tuple[Judged | int, list[Block]]:
        if isinstance(item, str):
            block = read_known(self.dataset, item)
            return len(block.rows), deal(block, self.num_partitions)
        return self._judge(item)

    def _judge(self, run: Run) -> tuple[Judged, list[Block]]:
        data, table = self.config.data, self.rows.read(run.low, run.high, COLUMNS)
        reasons = against(table, data)
        roles, names = labelled(table["role"])
        usable = reasons.are("") & (np.array(names or [""], object)[roles] == "instance")
        flags = np.where(usable, USABLE, 0).astype(np.uint8)
        flags |= np.where(_numpy(table, "repaired").astype(bool), REPAIRED, 0).astype(np.uint8)
        flags |= np.where(_numpy(table, "lines") > 1, OF_LINES, 0).astype(np.uint8)
        chosen, shares = np.flatnonzero(usable), Shares(data.split_seed, data.validation, data.test)
        digests = _chosen_digests(table, chosen)
        words, texts = digest_words(table)[chosen, :2], table["text_hash"].to_numpy()[chosen]
        splits = np.zeros(len(table), np.uint8)
        if data.split_by == "caption":
            splits[chosen] = splits_of([b"caption %016x" % text for text in texts.tolist()], shares)
        elif not data.stratify:
            splits[chosen] = splits_of(digests, shares)
        folds = np.zeros(len(table) if data.folds else 0, np.int16)
        if data.folds:
            folds[chosen] = folds_of(digests, data.split_seed, data.folds)
        histograms = {name: histogram(name, table[name].drop_null().to_numpy()) for name in QUALITY_CHECKS}
        no_pictures = Counter[str]()
        for row in np.flatnonzero(reasons.are("no_picture")).tolist():
            no_pictures += read_suffix_text(table["detail"][row].as_py())
        strata = labelled(table["stratum"]) if data.stratify else (np.empty(0, np.int32), [])
        judged = Judged(reasons, flags, splits, folds, strata, histograms, no_pictures)
        return judged, deal(Block(run.low + chosen, words, texts), self.num_partitions)


@dataclass(frozen=True)
class Seen:
    """What the runs and the partitions say of all rows.

    Attributes:
        reasons, flags, splits, folds, strata, histograms, no_pictures: of all runs, as in `Judged`.
        later, repeated: of all partitions, by row, as in `Copies`.
        num_known: number of pictures that an earlier run kept, also of those that are gone.
        known: int8, for the first row of a picture that an earlier run kept, the number in SPLITS of its
            split; else -1.
    """

    reasons: Labels
    flags: np.ndarray
    splits: np.ndarray
    folds: np.ndarray
    strata: tuple[np.ndarray, list[str]]
    histograms: dict[str, np.ndarray]
    no_pictures: Counter[str]
    later: np.ndarray
    repeated: np.ndarray
    known: np.ndarray
    num_known: int


def look_at(config: Config, rows: Rows, dataset: Storage, workers: Workers, num_partitions: int) -> Seen:
    """Judge all rows, and find the copies among them."""
    judge = Judge(config, rows.for_tasks(), dataset, num_partitions)
    items: list[Run | str] = [*rows.runs, *known_files(config, dataset)]
    found, partitions = workers.shuffle(judge, items, find_copies, num_partitions)
    judged = [each for each in found if isinstance(each, Judged)]
    known, copies = np.full(len(rows), -1, np.int8), list[Copies]()
    for each in partitions:
        known[each.known[:, 0]] = each.known[:, 1]
        copies.append(each)
    whole = {name: histogram(name, np.empty(0)) for name in QUALITY_CHECKS}
    no_pictures = Counter[str]()
    for run in judged:
        no_pictures += run.no_pictures
        whole = {name: counts + run.histograms[name] for name, counts in whole.items()}
    return Seen(
        joined((run.reasons for run in judged), first=""),
        np.concatenate([np.empty(0, np.uint8), *(run.flags for run in judged)]),
        np.concatenate([np.empty(0, np.uint8), *(run.splits for run in judged)]),
        np.concatenate([np.empty(0, np.int16), *(run.folds for run in judged)]),
        _joined_strata([run.strata for run in judged]),
        whole,
        no_pictures,
        _by_row([each.later for each in copies]),
        _by_row([each.repeated for each in copies]),
        known,
        sum(each for each in found if isinstance(each, int)),
    )


def _by_row(pairs: Sequence[np.ndarray]) -> np.ndarray:
    whole = np.concatenate([np.empty((0, 2), np.int64), *pairs])
    return whole[np.argsort(whole[:, 0])]


def _joined_strata(strata: Sequence[tuple[np.ndarray, list[str]]]) -> tuple[np.ndarray, list[str]]:
    numbers, codes = dict[str, int](), [np.empty(0, np.int32)]
    for of_run, names in strata:
        own = np.array([numbers.setdefault(name, len(numbers)) for name in names], np.int32)
        codes.append(own[of_run])
    return np.concatenate(codes), list(numbers)


def _numpy(table: pa.Table, name: str) -> np.ndarray:
    return np.asarray(table[name].to_numpy(zero_copy_only=False))


def _chosen_digests(table: pa.Table, chosen: np.ndarray) -> list[bytes]:
    """Return the digests of some rows in hexadecimal."""
    digests = fixed_bytes(table["digest"], 32)
    return [digests[32 * row : 32 * row + 32].hex().encode() for row in chosen.tolist()]


def against(table: pa.Table, config: DataConfig) -> Labels:
    """Return the reason against each row: that of its scan, or else of its size or measures; or ""."""
    codes, names = labelled(table["reason"])
    reasons = Labels(codes.astype(np.uint8), list(names))
    undecided = reasons.are("")
    for reason, failing in _faults(table, config.cleaning):
        found = undecided & failing
        if found.any():
            reasons.codes[found] = reasons.code(reason)
            undecided &= ~found
    for row in np.flatnonzero(undecided).tolist() if config.num_references else ():
        if found_in := reference_fault(table["references"][row].as_py() or (), config.cleaning):
            reasons.codes[row] = reasons.code(found_in.reason)
    return reasons


def _faults(table: pa.Table, cleaning: CleaningConfig) -> list[tuple[str, np.ndarray]]:
    """Return each reason by size or measures, and the rows that it holds for, as `check_size` and `check`."""
    columns = {name: _numpy(table, name).astype(np.float64) for name in SIZES}
    shorter = np.fmin(columns["width"], columns["height"])
    longer = np.fmax(columns["width"], columns["height"])
    found = [
        ("too_small", shorter < cleaning.min_side),
        ("extreme_aspect_ratio", longer > cleaning.max_aspect_ratio * shorter),
    ]
    for name, judged in QUALITY_CHECKS.items():
        threshold = getattr(cleaning, judged.field)
        if threshold is not None:
            passed = columns[name] >= threshold if judged.below else columns[name] <= threshold
            found.append((judged.reason, ~passed))
    return found


def fault(measured: Mapping[str, float], cleaning: CleaningConfig) -> Rejected | None:
    """Return the first fault of a picture's size and measures against the thresholds, or None.

    Args:
        measured: values of SIZES.
    """
    measures = ImageStats(**measured, hash=0, colours=b"")  # type: ignore[arg-type]
    try:
        check_size(measures.width, measures.height, cleaning)
        check(measures, cleaning)
    except Rejected as found:
        return found
    return None


def reference_fault(references: Sequence[tuple[int, int]], cleaning: CleaningConfig) -> Rejected | None:
    """Return the first fault of a row's reference pictures, or None.

    What they show is not judged: an edit may begin with a dark, a flat or a blurred one.

    Args:
        references: width and height of each.
    """
    try:
        for number, each in enumerate(references, 1):
            check_size(*each, cleaning, f"reference {number}: ")
    except Rejected as found:
        return found
    return None
