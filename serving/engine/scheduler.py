"""The state of every unfinished row, and the decision which rows the engine works on next.

A row waits in the queue, has its pictures encoded, if it has any, runs until its last step, and is decoded.
Nothing here calls a model: `engine.Engine` asks the scheduler what is next, computes it, and reports it.
"""

import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import torch

from ray_jobs.diffusion.memory import pictures_at_once
from serving.engine.adapters import AdapterCache
from serving.engine.rows import Kind, Picture, Row


class QueueFull(RuntimeError):
    """The queue is full; the request is rejected."""


class Encoding(NamedTuple):
    """A picture waiting to be encoded."""

    row: Row
    which: Picture

    @property
    def pixels(self) -> torch.Tensor:
        """Return the picture, uint8, height x width x 3, or 4 if it is the masked one."""
        request = self.row.request
        if isinstance(self.which, int):
            return request.references[self.which]
        pixels = {"image": request.image, "masked": self.row.masked, "control": request.control}[self.which]
        assert pixels is not None
        return pixels

    @property
    def kind(self) -> tuple[int, int, str]:
        """Return what pictures of one call share: height, width, and what they are."""
        height, width, _ = self.pixels.shape
        return height, width, "reference" if isinstance(self.which, int) else self.which


class Decoding(NamedTuple):
    """Latents waiting to be decoded."""

    row: Row
    latents: torch.Tensor  # C x ...
    done: int  # steps done
    last: bool  # True for the finished image, False for a preview


class Room(NamedTuple):
    """Free part of what rows that are being encoded or running may take together."""

    rows: int
    pixels: int  # of denoiser calls
    whole: int  # pixels while there is no row

    def fits(self, row: Row) -> bool:
        """Return True if there is room for a row: beside no other one, for a row of any size."""
        return self.rows > 0 and (row.pixels <= self.pixels or self.pixels == self.whole)

    def without(self, row: Row) -> "Room":
        """Return the room that is left beside a row."""
        return Room(self.rows - 1, self.pixels - row.pixels, self.whole)


class Scheduler:
    """Rows by stage. Call `add` from any thread, the rest from the stepping thread.

    Args:
        adapters: cache that must hold a row's adapter before the row is admitted; None: no adapters.
        max_rows: maximum rows being encoded or running at a time.
        max_pixels: maximum pixels of these rows in denoiser calls; a row of more runs alone.
        chunk_rows: maximum images encoded or decoded at a time; fewer of large ones (`pictures_at_once`).
        max_waiting: maximum rows waiting for a slot; None: no limit.
    """

    def __init__(
        self,
        adapters: AdapterCache | None,
        *,
        max_rows: int,
        max_pixels: int,
        chunk_rows: int,
        max_waiting: int | None,
    ) -> None:
        self.max_rows, self.max_pixels, self.chunk_rows = max_rows, max_pixels, chunk_rows
        self.waiting = RequestQueue(adapters, read_ahead=max_rows, max_waiting=max_waiting)
        self.encoding: list[Row] = []
        self.running: list[Row] = []
        self.decoding: deque[Decoding] = deque()
        self.calls = self.row_steps = self.first_steps = 0
        self.seconds_to_first_step = 0.0

    @property
    def rows(self) -> list[Row]:
        """Every unfinished row; twice, if a preview of it is waiting to be decoded."""
        return [*self.waiting.rows, *self.encoding, *self.running, *(each.row for each in self.decoding)]

    @property
    def unfinished(self) -> bool:
        """True while there is any row."""
        return bool(len(self.waiting) or self.encoding or self.running or self.decoding)

    @property
    def free(self) -> Room:
        """Room for rows that wait."""
        rows = [*self.encoding, *self.running]
        pixels = sum(row.pixels for row in rows)
        return Room(self.max_rows - len(rows), self.max_pixels - pixels, self.max_pixels)

    def add(self, row: Row) -> None:
        """Queue a row.

        Raises:
            QueueFull: the queue is full.
        """
        self.waiting.add(row, free=self.free)

    def admit(self) -> list[Row]:
        """Move the next rows of the queue into the free room, and return them."""
        joined = self.waiting.take(self.free)
        for row in joined:
            row.last_call = self.calls
            row.unencoded = [] if row.request.image is None else ["image"]
            row.unencoded += [] if row.masked is None else ["masked"]
            row.unencoded += ["control"] if row.is_controlled else []
            row.unencoded += range(len(row.request.references))
            (self.encoding if row.unencoded else self.running).append(row)
        return joined

    def next_to_encode(self) -> list[Encoding]:
        """Return the pictures that are encoded together: the longest waiting one, and others of its kind.
        Rows without further ones run from now on."""
        waiting = [Encoding(row, which) for row in self.encoding for which in row.unencoded]
        chunk = [each for each in waiting if each.kind == waiting[0].kind]
        chunk = chunk[: self._chunk_of(*chunk[0].kind[:2])] if chunk else []
        for each in chunk:
            each.row.unencoded.remove(each.which)
            each.row.last_call = self.calls
        self.running += [row for row in self.encoding if not row.unencoded]
        self.encoding = [row for row in self.encoding if row.unencoded]
        return chunk

    def next_to_denoise(self) -> list[Row]:
        """Return the rows of the next denoiser call: the kind whose row has waited longest for a step.

        With S kinds running, every row therefore steps at least once in S calls.
        """
        if len(self.decoding) >= self.max_rows:  # finished latents take memory too
            return []
        groups: dict[Kind, list[Row]] = {}
        for row in self.running:
            groups.setdefault(row.kind, []).append(row)
        group = min(groups.values(), key=lambda rows: min((r.last_call, r.arrival) for r in rows), default=[])
        for row in group:
            if not row.done:
                row.waited_s = time.monotonic() - row.submitted
                self.first_steps += 1
                self.seconds_to_first_step += row.waited_s
        return group

    def stepped(self, rows: Sequence[Row]) -> None:
        """Count a denoising step of these rows, and queue the latents that are due for decoding: the final
        ones of a finished row, the predicted clean ones for a preview."""
        self.calls += 1
        self.row_steps += len(rows)
        for row in rows:
            row.done += 1
            row.last_call = self.calls
            if row.finished or row.shows_preview:
                latents = row.latents if row.finished else row.clean
                self.decoding.append(Decoding(row, latents, row.done, row.finished))
        self.running = [row for row in self.running if not row.finished]

    def next_to_decode(self) -> list[Decoding]:
        """Remove and return the longest waiting latents and others of their size."""
        chunk: list[Decoding] = []
        others: deque[Decoding] = deque()
        for each in self.decoding:
            size = self.decoding[0].row.size
            fits = each.row.size == size and len(chunk) < self._chunk_of(*size)
            (chunk if fits else others).append(each)
        self.decoding = others
        return chunk

    def _chunk_of(self, height: int, width: int) -> int:
        """Return how many images of a size are encoded or decoded at a time."""
        return min(self.chunk_rows, pictures_at_once(height, width))

    def drop_answered(self) -> None:
        """Drop the rows that were cancelled or have failed."""
        self.waiting.drop_answered()
        self.encoding = [row for row in self.encoding if not row.future.done()]
        self.running = [row for row in self.running if not row.future.done()]
        self.decoding = deque(each for each in self.decoding if not each.row.future.done())


class RequestQueue:
    """Bounded queue of waiting rows, first come, first served. Call `add` from any thread, the rest from the
    stepping thread.

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

    def add(self, row: Row, *, free: Room) -> None:
        """Queue a row.

        Args:
            free: room in the engine; the rows that it takes next do not count as waiting ones.

        Raises:
            QueueFull: the queue is full.
        """
        with self._lock:
            if self._is_full(row, free):
                self._rows = [each for each in self._rows if not each.future.done()]
                if self._is_full(row, free):
                    self.rejected += 1
                    raise QueueFull(f"{len(self._rows)} requests are waiting; try again later")
            self._rows.append(row)
        row.future.add_done_callback(self._note_answered)

    def _is_full(self, row: Row, free: Room) -> bool:
        """Return True if more rows than may would wait with this one."""
        if self._max_waiting is None:
            return False
        waiting = [*self._rows, row]
        for number, each in enumerate(waiting):
            if not free.fits(each):
                return len(waiting) - number > self._max_waiting
            free = free.without(each)
        return False

    def take(self, free: Room) -> list[Row]:
        """Remove and return the earliest rows whose adapters are in memory, as many as there is room for.

        No row is passed by a later one that needs less room: large rows would wait for ever. Adapters are
        read ahead. A row whose adapter is still being read lets others pass, and takes the first room that
        becomes free afterwards.
        """
        taken: list[Row] = []
        ahead, full = 0, free.rows <= 0
        for row in self.rows:
            if full and (self._adapters is None or ahead >= self._read_ahead):
                break
            mixture, there = row.request.mixture, True
            if mixture and ahead < self._read_ahead:
                ahead += 1
                there = self._has_adapter(row)
            elif mixture:
                assert self._adapters is not None
                there = not full and self._adapters.holds(mixture) and self._has_adapter(row)
            if there and not full and free.fits(row):
                taken.append(row)
                free = free.without(row)
                full = free.rows <= 0
            elif there:
                full = True
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
        assert self._adapters is not None
        try:
            row.adapter = self._adapters.get(row.request.mixture)
        except Exception as error:  # reading may raise anything; only this request fails
            row.fail(error)
        return row.adapter is not None
