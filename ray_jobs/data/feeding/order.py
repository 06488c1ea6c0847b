"""Order of the training rows: a pure function of the seed, for any number of workers.

Rows are stored in parts (Parquet files, or runs of pictures). An epoch takes every row once, or according to
its source's weight. Per bucket (pictures of one shape), the parts and the rows of each part are shuffled, and
the result is cut into windows whose rows are shuffled again: the windowed shuffle of a dataset that does not
fit into memory. Two rows can be in one batch if their parts are in one window; since the parts are shuffled
anew each epoch, this holds for any two rows. With w parts per window, a batch of B holds on average B / w
rows of a part; with a full shuffle of p parts it holds B / p.

All rows of a batch are from one bucket. Rows of a bucket left at the end of an epoch start the bucket's first
batch of the next one, so that no row is ever skipped. The position in this order is one number: the step.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np


@dataclass(frozen=True)
class Part:
    """Rows that are read together.

    Attributes:
        rows: number of rows.
        bucket: shape of the rows; batches do not mix buckets.
        source: number of their source in the mixture.
    """

    rows: int
    bucket: str = ""
    source: int = 0


@dataclass(frozen=True)
class Step:
    """A batch: its step (counted from 1) and its rows as B x 2 (part, row in the part)."""

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
    """Range of a step's rows for one rank: consecutive rows, one more for the first ranks if uneven."""
    each, more = divmod(rows, world_size)
    first = rank * each + min(rank, more)
    return range(first, first + each + (rank < more))


class Order:
    """Batches of all steps.

    Args:
        parts: all parts, in a fixed order.
        batch_size: rows per step, over all workers.
        window_rows: rows shuffled at once, rounded to whole batches.
        seed: seed of the order; different seeds give independent orders.
        weights: share of each source's rows in an epoch. Without weights every row occurs once per epoch.

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
        """Rows per epoch of each bucket and source.

        Without weights this is the number of rows. With weights it is in their proportion, such that an epoch
        omits no row of any source.
        """
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
        """Realised share of each source's rows in an epoch."""
        taken: dict[int, int] = {}
        for quotas in self.quotas.values():
            for source, rows in quotas.items():
                taken[source] = taken.get(source, 0) + rows
        return {source: rows / self.rows_an_epoch for source, rows in sorted(taken.items())}

    def steps_before(self, epoch: int) -> int:
        """Number of steps that end in the epochs before `epoch` (counted from 0)."""
        return sum(rows * epoch // self.batch_size for rows in self.bucket_rows)

    def epoch_of(self, step: int) -> int:
        """Epoch of the last row of `step` (counted from 1)."""
        low, high = 0, 1
        while self.steps_before(high) < step:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.steps_before(middle) < step else (low, middle)
        return low

    def windows(self, first: int, last: int) -> Iterator[Window]:
        """Yield the windows that contain the steps `first` to `last`, clipped to these."""
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
        stop = min(start + self.steps_a_window, end)  # end of the whole window; `window` may be a part
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
        """Bucket of each of an epoch's steps."""
        counts = [
            rows * (epoch + 1) // self.batch_size - rows * epoch // self.batch_size
            for rows in self.bucket_rows
        ]
        labels = np.repeat(np.arange(len(counts)), counts)
        return self._generator(0, epoch).permutation(labels)

    def _shuffled(self, bucket: int, first: int, last: int) -> np.ndarray:
        """Batches `first` to `last` (exclusive) of a bucket: n x B x 2.

        Rows are shuffled within the range but stay in their epoch, so that all are seen equally often.
        """
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
        """A bucket's epoch as (part, first row, last row, lap) in shuffled order, and the end of each."""
        name = self.buckets[bucket]
        chunks = []
        for source, quota in self.quotas[name].items():
            parts = self.members[name][source]
            there = int(self.sizes[parts].sum())
            position, until, drawn = epoch * quota, (epoch + 1) * quota, -1
            while position < until:  # laps of the source, each in a different order
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
    """Two orders combined: each step has the rows of the first, then those of the second.

    Each order has its own epochs; a step's epoch is that of the first.

    Args:
        first, second: orders to combine; the second's parts are numbered after the first's.
        window_rows: rows read at once, rounded to whole batches. Windows are not cut at epochs, since a few
            pictures may make an epoch shorter than a step.
    """

    def __init__(self, first: Order, second: Order, *, window_rows: int) -> None:
        self.first, self.second = first, second
        self.batch_size = first.batch_size + second.batch_size
        self.steps_a_window = max(1, window_rows // self.batch_size)

    def windows(self, first: int, last: int) -> Iterator[Window]:
        """Yield windows that contain the steps `first` to `last`."""
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
