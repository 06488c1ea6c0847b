"""The feedback store: how each served image was generated, and people's feedback on it.

A thread writes generations, off the request path; a rating is on disk before it is answered.
"""

import atexit
import logging
import math
import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from secrets import token_bytes
from typing import NamedTuple

from sqlalchemy import ColumnElement, Connection, Engine, Executable, Table, and_, case, delete, func, select
from sqlalchemy.exc import InterfaceError, OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from ray_jobs.config import Config
from serving.feedback.database import (
    UPSERT,
    feedback_url,
    generations,
    open_database,
    ratings,
    secrets,
    votes,
)
from serving.feedback.job_store import JobStore
from serving.feedback.schemas import FeedbackRequest, FeedbackResponse, Generation
from serving.schemas import APIError

CAPACITY = 4096  # maximum queued generations
BATCH = 512  # maximum generations per commit
WAITS_S = 10.0  # timeout for room in the queue, and for the disk, in seconds
SLOWEST_RETRY_S = 30.0
FOREVER = 1e18  # seconds since 1970; databases know no infinity
UNREACHABLE = (OperationalError, InterfaceError, PoolTimeout)  # possibly temporary: worth a retry

log = logging.getLogger(__name__)


class Rated(NamedTuple):
    """A key's rating of an image."""

    image_id: str
    key_id: str
    rating: int
    comment: str | None


class Vote(NamedTuple):
    """A key's choice between two images."""

    winner_id: str
    loser_id: str
    key_id: str


class Period(NamedTuple):
    """When feedback was given, in seconds since 1970: after `since`, and until `until`."""

    since: float = 0.0
    until: float = math.inf


ALWAYS = Period()


class Compared(NamedTuple):
    """How often people preferred one of two versions, and how often the other."""

    wins: int
    losses: int


@dataclass(frozen=True)
class FeedbackTally:
    """Feedback on a version's images in numbers; `ups` and `downs` are ratings of +1 and -1."""

    model: str
    version: int
    role: str
    ups: int
    downs: int
    wins: int
    losses: int


class FeedbackStore:
    """Generations and ratings in SQL. Methods may be called from any thread; create one store per process.

    Args:
        engine: database engine from `open_database`, which `jobs` uses too.
        capacity: maximum queued generations; `record` blocks while the queue is full.
    """

    def __init__(self, engine: Engine, capacity: int = CAPACITY) -> None:
        self._engine = engine
        self.jobs = JobStore(engine)
        self._upsert = UPSERT[engine.dialect.name]
        self._queue: queue.Queue[Generation | threading.Event] = queue.Queue(capacity)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._write, name="feedback", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    @classmethod
    def open(cls, config: Config) -> "FeedbackStore":
        """Open the store of a configuration.

        Raises:
            ConfigError: the database cannot be opened; names serve.feedback_url.
        """
        return cls(open_database(feedback_url(config)))

    def record(self, generation: Generation, timeout_s: float = WAITS_S) -> None:
        """Queue a generation for the writer; block while the queue is full, and drop nothing.

        Raises:
            APIError: 503, there is no room after `timeout_s` seconds (the disk or the database is gone), or
                the store is closed.
        """
        if self._closing.is_set():
            raise _unavailable()
        try:
            self._queue.put(generation, timeout=timeout_s)
        except queue.Full:
            raise _unavailable() from None

    def flush(self, timeout_s: float = WAITS_S) -> None:
        """Return once everything recorded before is on disk.

        Raises:
            APIError: 503, this takes more than `timeout_s` seconds.
        """
        written, deadline = threading.Event(), time.monotonic() + timeout_s
        try:
            self._queue.put(written, timeout=timeout_s)
        except queue.Full:
            raise _unavailable() from None
        if not written.wait(max(0.0, deadline - time.monotonic())):
            raise _unavailable()

    def rate(self, request: FeedbackRequest, key_id: str | None = None) -> FeedbackResponse:
        """Commit a rating, a vote or both; a later one by the same key replaces the former.

        Args:
            key_id: id of the API key; None: no keys are used, and all clients share one rating per image.

        Raises:
            APIError: 404 for an image that is not in this store, 503 if the database does not answer.
        """
        now, key = time.time(), key_id or ""
        try:
            self._require_known(request)
            with self._engine.begin() as connection:
                if request.rating is not None:
                    row = {"rating": request.rating, "comment": _storable(request.comment), "created": now}
                    connection.execute(self._replace(ratings, row, image_id=request.image_id, key_id=key))
                if request.over is not None:
                    row = {"winner_id": request.image_id, "loser_id": request.over, "created": now}
                    row["comment"] = _storable(request.comment)
                    pair = " ".join(sorted((request.image_id, request.over)))
                    connection.execute(self._replace(votes, row, pair=pair, key_id=key))
        except UNREACHABLE as error:
            log.error("feedback: a rating was not kept: %s", error)
            raise _unavailable() from error
        return FeedbackResponse(created=int(now), **request.model_dump())

    def _replace(self, table: Table, row: dict[str, object], **key: str) -> Executable:
        """Make a statement that inserts a row, or replaces the one with the same key."""
        return self._upsert(table).values(**key, **row).on_conflict_do_update(index_elements=[*key], set_=row)

    def _require_known(self, request: FeedbackRequest) -> None:
        """Raise APIError 404 for an image that was not recorded."""
        named = {"image_id": request.image_id, "over": request.over}
        for is_last in (False, True):
            known = {row.image_id for row in self.generations([each for each in named.values() if each])}
            missing = [field for field, image in named.items() if image and image not in known]
            if not missing:
                return
            if not is_last:
                self.flush()  # the image may have been generated a moment ago
        message = f"{missing[0]}: this server has no image {named[missing[0]]!r}"
        raise APIError(404, message, param=missing[0], code="image_not_found")

    def generations(self, image_ids: Sequence[str]) -> list[Generation]:
        """Return the known generations among `image_ids`, the oldest first."""
        known = []
        with self._engine.connect() as connection:
            for start in range(0, len(image_ids), BATCH):
                wanted = generations.c.image_id.in_(image_ids[start : start + BATCH])
                rows = connection.execute(select(generations).where(wanted)).mappings()
                known += [Generation.model_validate(dict(row)) for row in rows]
        return sorted(known, key=lambda each: (each.created, each.image_id))

    def ratings(self, period: Period = ALWAYS) -> list[Rated]:
        """Return the ratings of a period, sorted by image and key."""
        columns = (ratings.c.image_id, ratings.c.key_id, ratings.c.rating, ratings.c.comment)
        with self._engine.connect() as connection:
            chosen = select(*columns).where(_within(ratings, period)).order_by(*columns[:2])
            return [Rated(*row) for row in connection.execute(chosen)]

    def votes(self, period: Period = ALWAYS) -> list[Vote]:
        """Return the votes of a period, sorted by pair of images and key."""
        with self._engine.connect() as connection:
            columns = (votes.c.winner_id, votes.c.loser_id, votes.c.key_id)
            chosen = select(*columns).where(_within(votes, period)).order_by(votes.c.pair, votes.c.key_id)
            return [Vote(*row) for row in connection.execute(chosen)]

    def compared(self, model: str, version: int, other: int) -> Compared:
        """Return how people compare two versions of a model.

        Votes between their images count; and ratings, of which the n-th of one version and the n-th of the
        other, as they came in, make a comparison unless they are equal. A key counts once for an image, and
        once for a version's images of one prompt.

        Raises:
            APIError: 503, the database does not answer.
        """
        one, another = generations.alias(), generations.alias()
        try:
            with self._engine.connect() as connection:
                wins, losses = (
                    connection.scalar(
                        select(func.count())
                        .select_from(
                            votes.join(one, one.c.image_id == votes.c.winner_id).join(
                                another, another.c.image_id == votes.c.loser_id
                            )
                        )
                        .where(one.c.model == model, another.c.model == model)
                        .where(one.c.version == winner, another.c.version == loser)
                    )
                    or 0
                    for winner, loser in ((version, other), (other, version))
                )
                rated = [self._rated(connection, model, each) for each in (version, other)]
        except SQLAlchemyError as error:
            raise _unavailable() from error
        pairs = list(zip(*rated, strict=False))
        return Compared(
            wins + sum(mine > theirs for mine, theirs in pairs),
            losses + sum(mine < theirs for mine, theirs in pairs),
        )

    def _rated(self, connection: Connection, model: str, version: int) -> list[int]:
        """Return a version's ratings as they came in: a key's first one of the images of each prompt."""
        rows = connection.execute(
            select(ratings.c.key_id, generations.c.prompt, ratings.c.rating)
            .select_from(ratings.join(generations, generations.c.image_id == ratings.c.image_id))
            .where(generations.c.model == model, generations.c.version == version, ratings.c.rating != 0)
            .order_by(ratings.c.created, ratings.c.image_id)
        )
        first: dict[tuple[str, str], int] = {}
        for key, prompt, rating in rows:
            first.setdefault((key, prompt), rating)
        return list(first.values())

    def tally(self) -> list[FeedbackTally]:
        """Count the feedback on each model, version and role, to compare versions.

        Raises:
            APIError: 503, the database does not answer.
        """
        identity = (generations.c.model, generations.c.version, generations.c.role)

        def count(condition: ColumnElement[bool]) -> ColumnElement[int]:
            return func.sum(case((condition, 1), else_=0))

        counts_by_version: dict[tuple[str, int, str], dict[str, int]] = {}
        wanted = {
            "ups": (ratings.c.image_id, count(ratings.c.rating == 1)),
            "downs": (ratings.c.image_id, count(ratings.c.rating == -1)),
            "wins": (votes.c.winner_id, func.count()),
            "losses": (votes.c.loser_id, func.count()),
        }
        try:
            with self._engine.connect() as connection:
                for name, (image_id, number) in wanted.items():
                    joined = generations.join(image_id.table, generations.c.image_id == image_id)
                    query = select(*identity, number).select_from(joined).group_by(*identity)
                    for *version, total in connection.execute(query):
                        counts_by_version.setdefault(tuple(version), {})[name] = int(total)
        except SQLAlchemyError as error:
            raise _unavailable() from error
        return [
            FeedbackTally(*version, *(counts.get(name, 0) for name in wanted))
            for version, counts in sorted(counts_by_version.items())
        ]

    def delete_before(self, time: float) -> int:
        """Delete the generations of before a time, in seconds since 1970, with all feedback on them.

        Return their number. Votes go with either of their images. Rows are deleted a batch at a time, so that
        writers wait for no more than one.

        Raises:
            SQLAlchemyError: the database does not answer.
        """
        deleted = 0
        oldest = select(generations.c.image_id).where(generations.c.created < time).limit(BATCH)
        while True:
            with self._engine.begin() as connection:
                gone = list(connection.scalars(oldest))
                if not gone:
                    return deleted
                either = votes.c.winner_id.in_(gone) | votes.c.loser_id.in_(gone)
                connection.execute(delete(votes).where(either))
                connection.execute(delete(ratings).where(ratings.c.image_id.in_(gone)))
                connection.execute(delete(generations).where(generations.c.image_id.in_(gone)))
            deleted += len(gone)

    def secret(self, name: str) -> bytes:
        """Return a random key of 32 bytes that all processes with this database share; made at its first use.

        Raises:
            APIError: 503, the database does not answer.
        """
        made = self._upsert(secrets).values(name=name, value=token_bytes(32)).on_conflict_do_nothing()
        try:
            with self._engine.begin() as connection:
                connection.execute(made)
                value = connection.execute(select(secrets.c.value).where(secrets.c.name == name))
                return bytes(value.scalar_one())
        except SQLAlchemyError as error:
            raise _unavailable() from error

    def close(self) -> None:
        """Write the queued generations, and close the store; nothing can be recorded afterwards. May be
        called twice."""
        atexit.unregister(self.close)
        if not self._closing.is_set():
            self._closing.set()
            self._queue.put(threading.Event())  # wakes the writer
            self._thread.join()
            self._engine.dispose()

    def _write(self) -> None:
        """Run the writer thread: generations queued during one commit form the next one."""
        while not (self._closing.is_set() and self._queue.empty()):
            taken = [self._queue.get()]
            while len(taken) < BATCH and not self._queue.empty():
                taken.append(self._queue.get_nowait())
            self._insert([each for each in taken if isinstance(each, Generation)])
            for each in taken:
                if isinstance(each, threading.Event):
                    each.set()

    def _insert(self, batch: list[Generation]) -> None:
        """Commit a batch, retrying as often as needed; insert row by row if its content is rejected."""
        rows = [{name: _storable(value) for name, value in each.model_dump().items()} for each in batch]
        wait_s = 0.1
        while rows:
            try:
                with self._engine.begin() as connection:
                    # A commit whose answer was lost is repeated; the same id means the same image.
                    connection.execute(self._upsert(generations).on_conflict_do_nothing(), rows)
                return
            except UNREACHABLE as error:
                log.error("feedback: %d generations wait for the database: %s", len(rows), error)
                if self._closing.wait(wait_s) and wait_s >= 1:
                    log.error("feedback: %d generations are lost: the server stops without it", len(rows))
                    return
                wait_s = min(2 * wait_s, SLOWEST_RETRY_S)
            except SQLAlchemyError as error:
                if len(batch) == 1:
                    log.error("feedback: generation %s was refused: %s", batch[0].image_id, error)
                    return
                for each in batch:
                    self._insert([each])
                return


def _within(table: Table, period: Period) -> ColumnElement[bool]:
    """Return the condition that a row of a table is of a period."""
    return and_(table.c.created > period.since, table.c.created <= min(period.until, FOREVER))


def _storable(value: object) -> object:
    """Replace characters that cannot be stored: null in PostgreSQL, lone surrogates in any database."""
    if not isinstance(value, str):
        return value
    return value.replace("\0", "\N{REPLACEMENT CHARACTER}").encode(errors="replace").decode()


def _unavailable() -> APIError:
    return APIError(503, "the feedback database does not answer; try again", code="feedback_unavailable")
