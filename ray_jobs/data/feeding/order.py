"""The order in which training sees its rows: a pure function of the seed, whatever the number of workers.

Rows lie in parts (Parquet files, or runs of pictures). An epoch takes every row once, or by its source's
weight. Per bucket (pictures of one shape), the parts are shuffled, the rows of each part are shuffled, and
the result is cut into windows whose rows are shuffled again: the windowed shuffle of a set that does not fit
into memory. Two rows can meet in a batch if their parts fall into one window; since the parts are dealt
anew each epoch, any two rows can. With w parts a window, a batch of B holds on average B / w rows of a
part, where a full shuffle of p parts holds B / p.

A step's batch is of one bucket. What is left of a bucket at the end of an epoch starts the bucket's first
batch of the next one, so that no row is ever left out. The position in this order is one number: the step.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np


@dataclass(frozen=True)
class Part:
    """Rows that are read together.

    Attributes:
        rows: how many.
        bucket: of what shape; batches do not mix buckets.
        source: which source of the mixture they come from.
    """

    rows: int
    bucket: str = ""
    source: int = 0


@dataclass(frozen=True)
class Step:
    """A batch: its step (counted from 1) and the B x 2 (part, row in the part) that it consists of."""

    step: int
    epoch: int
    bucket: str
    rows: np.ndarray


@dataclass(frozen=True)
class Window:
    """Consecutive steps of one epoch whose rows are shuffled together: `first` to `last`, inclusive."""

    epoch: int
    first: int
    last: int


def rows_of_rank(rows: int, world_size: int, rank: int) -> range:
    """Which of a step's rows a rank gets: consecutive ones, the first ranks one more where it does not
    divide."""
    each, more = divmod(rows, world_size)
    first = rank * each + min(rank, more)
    return range(first, first + each + (rank < more))


class Order:
    """The batches of all steps.

    Args:
        parts: all of them, in a fixed order.
        batch_size: rows a step, over all workers.
        window_rows: rows that are shuffled at once, rounded to whole batches.
        seed: another one gives another, independent order.
        weights: by source; the share of its rows in an epoch. Without weights every row comes once an epoch.

    Raises:
        ValueError: there are no rows.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        *,
        batch_size: int,
        window_rows: int,
        seed: int,
        weights: dict[int, float] | None = None,
    ) -> None:
        if not any(part.rows for part in parts):
            raise ValueError("parts: no rows to train on")
        self.batch_size, self.seed = batch_size, seed
        self.steps_a_window = max(1, window_rows // batch_size)
        self.sizes = np.array([part.rows for part in parts])
        self.members: dict[str, dict[int, list[int]]] = {}  # bucket -> source -> part numbers
        for number, part in enumerate(parts):
            if part.rows:
                self.members.setdefault(part.bucket, {}).setdefault(part.source, []).append(number)
        self.buckets = sorted(self.members)
        self.quotas = self._quotas(weights)
        self.bucket_rows = [sum(self.quotas[bucket].values()) for bucket in self.buckets]
        self.rows_an_epoch = sum(self.bucket_rows)

    def _quotas(self, weights: dict[int, float] | None) -> dict[str, dict[int, int]]:
        """Rows an epoch of each bucket and source: as many as there are, or in the proportion of the weights
        with no source of which an epoch would leave rows out."""
        there = {b: {s: int(self.sizes[n].sum()) for s, n in m.items()} for b, m in self.members.items()}
        if not weights:
            return there
        totals: dict[int, int] = {}
        for counts in there.values():
            for source, rows in counts.items():
                totals[source] = totals.get(source, 0) + rows
        whole = sum(weights[source] for source in totals)
        epoch = max(rows * whole / weights[source] for source, rows in totals.items())
        times = {source: epoch * weights[source] / whole / rows for source, rows in totals.items()}
        return {b: {s: round(rows * times[s]) for s, rows in counts.items()} for b, counts in there.items()}

    def shares(self) -> dict[int, float]:
        """The realised share of each source's rows in an epoch."""
        taken: dict[int, int] = {}
        for quotas in self.quotas.values():
            for source, rows in quotas.items():
                taken[source] = taken.get(source, 0) + rows
        return {source: rows / self.rows_an_epoch for source, rows in sorted(taken.items())}

    def steps_before(self, epoch: int) -> int:
        """How many steps end in the epochs before `epoch` (counted from 0)."""
        return sum(rows * epoch // self.batch_size for rows in self.bucket_rows)

    def epoch_of(self, step: int) -> int:
        """The epoch that `step` (counted from 1) belongs to: that of its last row."""
        low, high = 0, 1
        while self.steps_before(high) < step:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.steps_before(middle) < step else (low, middle)
        return low

    def windows(self, first: int, last: int) -> Iterator[Window]:
        """The windows that hold the steps `first` to `last`, cut to these."""
        epoch = self.epoch_of(first)
        while self.steps_before(epoch) < last:
            begin, end = self.steps_before(epoch) + 1, self.steps_before(epoch + 1)
            skipped = max(0, first - begin) // self.steps_a_window * self.steps_a_window
            for start in range(begin + skipped, min(end, last) + 1, self.steps_a_window):
                stop = min(start + self.steps_a_window - 1, end)
                yield Window(epoch, max(start, first), min(stop, last))
            epoch += 1

    def steps(self, window: Window) -> list[Step]:
        """The batches of a window."""
        begin, end = self.steps_before(window.epoch), self.steps_before(window.epoch + 1)
        start = begin + (window.first - 1 - begin) // self.steps_a_window * self.steps_a_window
        stop = min(start + self.steps_a_window, end)  # of the whole window, of which `window` may be a part
        labels = self._labels(window.epoch)
        inside = labels[start - begin : stop - begin]
        batches: dict[int, Iterator[np.ndarray]] = {}
        for number in np.unique(inside):
            done = self.bucket_rows[number] * window.epoch // self.batch_size
            done += int((labels[: start - begin] == number).sum())
            rows = self._shuffled(int(number), done, done + int((inside == number).sum()))
            batches[int(number)] = iter(rows)
        found = [
            Step(step, window.epoch, self.buckets[number], next(batches[int(number)]))
            for step, number in enumerate(inside, start + 1)
        ]
        return [step for step in found if window.first <= step.step <= window.last]

    def _labels(self, epoch: int) -> np.ndarray:
        """The bucket of each of an epoch's steps."""
        counts = [
            rows * (epoch + 1) // self.batch_size - rows * epoch // self.batch_size
            for rows in self.bucket_rows
        ]
        labels = np.repeat(np.arange(len(counts)), counts)
        return self._generator(0, epoch).permutation(labels)

    def _shuffled(self, bucket: int, first: int, last: int) -> np.ndarray:
        """Batches `first` to `last` (exclusive) of a bucket: n x B x 2. Rows are shuffled within the range,
        but do not leave their epoch, so that each has been seen as often as the others."""
        begin, end, size = first * self.batch_size, last * self.batch_size, self.bucket_rows[bucket]
        pieces = []
        for epoch in range(begin // size, (end - 1) // size + 1):
            low, high = max(begin, epoch * size), min(end, (epoch + 1) * size)
            rows = self._dealt(bucket, epoch, low - epoch * size, high - epoch * size)
            pieces.append(self._generator(1, bucket, epoch, low - epoch * size).permutation(rows))
        return np.concatenate(pieces).reshape(last - first, self.batch_size, 2)

    def _dealt(self, bucket: int, epoch: int, low: int, high: int) -> np.ndarray:
        """Rows `low` to `high` of a bucket's epoch before the windows are shuffled: n x 2."""
        chunks, ends = self._chunks(bucket, epoch)
        found = []
        index = int(np.searchsorted(ends, low, side="right"))
        while index < len(chunks) and ends[index] - (chunks[index][2] - chunks[index][1]) < high:
            part, begin, end, lap = chunks[index]
            start = int(ends[index]) - (end - begin)
            order = self._generator(2, part, lap).permutation(int(self.sizes[part]))
            rows = order[begin + max(0, low - start) : end - max(0, int(ends[index]) - high)]
            found.append(np.stack([np.full(len(rows), part), rows], axis=1))
            index += 1
        return np.concatenate(found)

    @lru_cache(maxsize=64)  # noqa: B019  an Order lives as long as its training
    def _chunks(self, bucket: int, epoch: int) -> tuple[list[tuple[int, int, int, int]], np.ndarray]:
        """A bucket's epoch as (part, first row, last row, lap) in shuffled order, and where each ends."""
        name = self.buckets[bucket]
        chunks = []
        for source, quota in self.quotas[name].items():
            parts = self.members[name][source]
            there = int(self.sizes[parts].sum())
            position, until, drawn = epoch * quota, (epoch + 1) * quota, -1
            while position < until:  # laps of the source, each in another order
                lap, inside = divmod(position, there)
                if lap != drawn:
                    order = self._generator(3, bucket, source, lap).permutation(parts)
                    ends, drawn = np.cumsum(self.sizes[order]), lap
                index = int(np.searchsorted(ends, inside, side="right"))
                begin = inside - (int(ends[index]) - int(self.sizes[order[index]]))
                end = min(int(self.sizes[order[index]]), begin + until - position)
                chunks.append((int(order[index]), begin, end, lap))
                position += end - begin
        dealt = [chunks[i] for i in self._generator(4, bucket, epoch).permutation(len(chunks))]
        return dealt, np.cumsum([end - begin for _, begin, end, _ in dealt])

    def _generator(self, *purpose: int) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64(np.random.SeedSequence([self.seed, *purpose])))


class JoinedOrder:
    """Two orders side by side: each step has the rows of the one, then those of the other.

    Each goes round in its own epochs; a step counts as one of the first's.

    Args:
        first, second: the second's parts are numbered behind the first's.
        window_rows: rows that are read at once, rounded to whole batches. Windows are not cut at epochs,
            which a few pictures fill in less than a step.
    """

    def __init__(self, first: Order, second: Order, *, window_rows: int) -> None:
        self.first, self.second = first, second
        self.batch_size = first.batch_size + second.batch_size
        self.steps_a_window = max(1, window_rows // self.batch_size)

    def windows(self, first: int, last: int) -> Iterator[Window]:
        """Windows that hold the steps `first` to `last`."""
        for start in range(first, last + 1, self.steps_a_window):
            yield Window(self.first.epoch_of(start), start, min(start + self.steps_a_window - 1, last))

    def steps(self, window: Window) -> list[Step]:
        """The batches of a window."""
        both = zip(_steps(self.first, window), _steps(self.second, window), strict=True)
        behind = [len(self.first.sizes), 0]
        return [replace(one, rows=np.concatenate([one.rows, other.rows + behind])) for one, other in both]


def _steps(order: Order, window: Window) -> Iterator[Step]:
    for own in order.windows(window.first, window.last):
        yield from order.steps(own)
