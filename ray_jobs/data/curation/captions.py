"""Counts of captions: equal ones of all runs of rows meet in a partition by their hash."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ray_jobs.data.curation.rows import Rows, Run
from ray_jobs.data.curation.workers import Workers

Counted = tuple[np.ndarray, np.ndarray]  # hashes of different captions (uint64), and their rows (int64)


@dataclass(frozen=True)
class CaptionCounts:
    """Captions of some rows.

    Attributes:
        different: number of different captions.
        repeated: number of rows whose caption another row has too.
        most: rows of the captions that most rows have, by their hashes; only those of several rows.
    """

    different: int
    repeated: int
    most: dict[int, int]


@dataclass(frozen=True)
class _Deal:
    rows: Rows
    num_partitions: int

    def __call__(self, item: tuple[Run, np.ndarray]) -> tuple[None, list[Counted]]:
        run, chosen = item
        hashes = self.rows.read(run.low, run.high, ["text_hash"])["text_hash"].to_numpy()[chosen]
        different, counts = np.unique(hashes, return_counts=True)
        receivers = different % np.uint64(self.num_partitions)
        return None, [(different[receivers == n], counts[receivers == n]) for n in range(self.num_partitions)]


@dataclass(frozen=True)
class _Count:
    most: int

    def __call__(self, blocks: Sequence[Counted]) -> CaptionCounts:
        hashes, counts = (np.concatenate(columns) for columns in zip(*blocks, strict=True))
        different, number = np.unique(hashes, return_inverse=True)
        rows = np.bincount(number, counts, len(different)).astype(np.int64)
        order = np.argsort(-rows, kind="stable")[: self.most]
        most = {int(different[n]): int(rows[n]) for n in order if rows[n] > 1}
        return CaptionCounts(len(different), int(rows[rows > 1].sum()), most)


def count_captions(
    rows: Rows, chosen: np.ndarray, workers: Workers, num_partitions: int, most: int = 0
) -> CaptionCounts:
    """Count the captions of chosen rows.

    Args:
        chosen: bool, one per row.
        most: number of captions in `CaptionCounts.most`.
    """
    items = [(run, chosen[run.low : run.high]) for run in rows.runs]
    deal = _Deal(rows.for_tasks(), num_partitions)
    found = list(workers.shuffle(deal, items, _Count(most), num_partitions)[1]) if items else []
    every = sorted((-count, text) for each in found for text, count in each.most.items())[:most]
    return CaptionCounts(
        sum(each.different for each in found),
        sum(each.repeated for each in found),
        {text: -count for count, text in every},
    )
