"""Which requests get a place in the engine, and which of its rows step next.

Requests wait in a bounded queue, first come, first served.
"""

import threading
from collections.abc import Sequence

from serving.engine.adapters import AdapterCache
from serving.engine.rows import Kind, Row


class QueueFull(RuntimeError):
    """As many requests wait as may; this one is not accepted."""


class RequestQueue:
    """`add` from any thread, the rest from the one that steps.

    Args:
        adapters: which rows need in memory before they have a place; None: there are none.
        read_ahead: adapters that are read for rows that wait.
        max_waiting: rows that may wait for a place, None: any number.
    """

    def __init__(self, adapters: AdapterCache | None, *, read_ahead: int, max_waiting: int | None) -> None:
        self._adapters, self._read_ahead, self._max_waiting = adapters, read_ahead, max_waiting
        self._rows: list[Row] = []
        self._answered = False  # whether any row was, since they were last looked through
        self._lock = threading.Lock()
        self.rejected = 0

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def rows(self) -> Sequence[Row]:
        return tuple(self._rows)

    def add(self, row: Row, *, free: int) -> None:
        """Let a row wait.

        Args:
            free: places in the engine, for which nobody has to wait.

        Raises:
            QueueFull: if as many wait as may.
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
        """The rows that came first and whose adapters are in memory, at most as many as there are places.

        Adapters are read ahead. A row whose adapter is still being read is passed by others, and takes the
        first place that is free afterwards.
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
        """Forget the rows that were cancelled or have failed."""
        if self._answered:
            self._forget(set())

    def _note_answered(self, _: object) -> None:
        self._answered = True

    def _forget(self, taken: set[Row]) -> None:
        self._answered = False
        with self._lock:
            self._rows = [row for row in self._rows if row not in taken and not row.future.done()]

    def _has_adapter(self, row: Row) -> bool:
        """Whether the row's adapter is in memory; if not, it is read."""
        if row.adapter is not None:
            return True
        assert self._adapters is not None and row.request.adapter is not None
        try:
            row.adapter = self._adapters.get(row.request.adapter)
        except Exception as error:  # whatever reading it may raise is the answer to this request
            row.fail(error)
        return row.adapter is not None


def next_group(rows: Sequence[Row]) -> list[Row]:
    """Which rows share the next denoiser call: those of the kind whose row has waited longest for a step.

    So of S kinds that are being drawn every row steps at least once in S calls.
    """
    groups: dict[Kind, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.kind, []).append(row)
    return min(groups.values(), key=lambda group: min((r.last_call, r.arrival) for r in group), default=[])
