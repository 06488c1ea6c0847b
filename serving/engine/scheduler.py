"""Admission of requests to the engine, and the choice of the rows that step next.

Requests wait in a bounded queue, first come, first served.
"""

import threading
from collections.abc import Sequence

from serving.engine.adapters import AdapterCache
from serving.engine.rows import Kind, Row


class QueueFull(RuntimeError):
    """The queue is full; the request is rejected."""


class RequestQueue:
    """Queue of waiting rows: call `add` from any thread, the rest from the stepping thread.

    Args:
        adapters: cache that must hold a row's adapter before the row is admitted; None: no adapters.
        read_ahead: number of waiting rows whose adapters are read ahead.
        max_waiting: maximum rows waiting for a slot; None: no limit.
    """

    def __init__(self, adapters: AdapterCache | None, *, read_ahead: int, max_waiting: int | None) -> None:
        self._adapters, self._read_ahead, self._max_waiting = adapters, read_ahead, max_waiting
        self._rows: list[Row] = []
        self._answered = False  # True if any row was answered since the last cleanup
        self._lock = threading.Lock()
        self.rejected = 0

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def rows(self) -> Sequence[Row]:
        return tuple(self._rows)

    def add(self, row: Row, *, free: int) -> None:
        """Queue a row.

        Args:
            free: free slots in the engine; that many more rows may be queued than `max_waiting`.

        Raises:
            QueueFull: the queue is full.
        """
        with self._lock:
            if self._max_waiting is not None and len(self._rows) >= self._max_waiting + free:
                self._rows = [each for each in self._rows if not each.future.done()]
                if len(self._rows) >= self._max_waiting + free:
                    self.rejected += 1
                    raise QueueFull(f"{len(self._rows)} requests are waiting; try again later")
            self._rows.append(row)
        row.future.add_done_callback(self._note_answered)

    def take(self, places: int) -> list[Row]:
        """Remove and return the earliest rows whose adapters are in memory, at most `places` of them.

        Adapters are read ahead. A row whose adapter is still being read lets others pass, and takes the first
        slot that becomes free afterwards.
        """
        taken: list[Row] = []
        ahead = 0
        for row in self.rows:
            if len(taken) >= places and (self._adapters is None or ahead >= self._read_ahead):
                break
            name, there = row.request.adapter, True
            if name is not None and ahead < self._read_ahead:
                ahead += 1
                there = self._has_adapter(row)
            elif name is not None:
                assert self._adapters is not None
                there = len(taken) < places and self._adapters.holds(name) and self._has_adapter(row)
            if there and len(taken) < places:
                taken.append(row)
        if taken or self._answered:  # a row may just have failed
            self._forget(set(taken))
        return taken

    def drop_answered(self) -> None:
        """Drop the rows that were cancelled or have failed."""
        if self._answered:
            self._forget(set())

    def _note_answered(self, _: object) -> None:
        self._answered = True

    def _forget(self, taken: set[Row]) -> None:
        self._answered = False
        with self._lock:
            self._rows = [row for row in self._rows if row not in taken and not row.future.done()]

    def _has_adapter(self, row: Row) -> bool:
        """Return True if the row's adapter is in memory; otherwise start reading it."""
        if row.adapter is not None:
            return True
        assert self._adapters is not None and row.request.adapter is not None
        try:
            row.adapter = self._adapters.get(row.request.adapter)
        except Exception as error:  # reading may raise anything; only this request fails
            row.fail(error)
        return row.adapter is not None


def next_group(rows: Sequence[Row]) -> list[Row]:
    """Return the rows of the next denoiser call: the kind whose row has waited longest for a step.

    With S kinds running, every row therefore steps at least once in S calls.
    """
    groups: dict[Kind, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.kind, []).append(row)
    return min(groups.values(), key=lambda group: min((r.last_call, r.arrival) for r in group), default=[])
