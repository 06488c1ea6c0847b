"""Jobs in the feedback database, so that a new ingress process continues them."""

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import ColumnElement, Engine, delete, func, select, update

from serving.feedback.database import jobs
from serving.jobs import OPEN, Kind, State


@dataclass(frozen=True)
class JobRecord:
    """A job as it is stored; its pictures are files.

    Attributes:
        key_id: id of the API key, or `anonymous`.
        request: JSON of the request, with its seed.
        num_images, has_mask: the files that came with it.
        base_url: address of the application, as the client reached it.
        error: JSON of an ErrorBody.
        notified: 1 if no webhook is due.
    """

    id: str
    created: float
    key_id: str
    kind: Kind
    state: State
    request: str
    num_images: int
    has_mask: int
    base_url: str
    webhook_url: str | None
    error: str | None = None
    finished: float | None = None
    notified: int = 1


class JobStore:
    """The jobs' table. Methods block, may be called from any thread, and raise SQLAlchemyError."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def add(self, job: JobRecord) -> None:
        """Store a new job; it is on disk when this returns."""
        with self._engine.begin() as connection:
            connection.execute(jobs.insert().values(**vars(job)))

    def get(self, job_id: str) -> JobRecord | None:
        """Return a job, if there is one."""
        return next(iter(self._where(jobs.c.id == job_id)), None)

    def unfinished(self) -> list[JobRecord]:
        """Return the jobs that are to be drawn, or whose end is to be announced; the oldest first."""
        return self._where(jobs.c.state.in_(OPEN) | (jobs.c.notified == 0))

    def finished_before(self, time: float) -> list[str]:
        """Return the ids of jobs that ended before a time, in seconds since 1970."""
        with self._engine.connect() as connection:
            return list(connection.scalars(select(jobs.c.id).where(jobs.c.finished < time)))

    def num_open(self, key_id: str | None = None) -> int:
        """Return the number of open jobs, of one key or of all."""
        query = select(func.count()).select_from(jobs).where(jobs.c.state.in_(OPEN))
        if key_id is not None:
            query = query.where(jobs.c.key_id == key_id)
        with self._engine.connect() as connection:
            return connection.scalar(query) or 0

    def change(self, job_id: str, *, only: Sequence[State], **values: str | float | None) -> bool:
        """Change a job that is in one of the states `only`; return False if it is in none of them."""
        change = update(jobs).where(jobs.c.id == job_id, jobs.c.state.in_(only)).values(**values)
        with self._engine.begin() as connection:
            return bool(connection.execute(change).rowcount)

    def set_notified(self, job_id: str) -> None:
        """Note that no webhook is due any more."""
        with self._engine.begin() as connection:
            connection.execute(update(jobs).where(jobs.c.id == job_id).values(notified=1))

    def delete(self, job_id: str) -> None:
        """Delete a job."""
        with self._engine.begin() as connection:
            connection.execute(delete(jobs).where(jobs.c.id == job_id))

    def _where(self, condition: ColumnElement[bool]) -> list[JobRecord]:
        with self._engine.connect() as connection:
            rows = connection.execute(select(jobs).where(condition).order_by(jobs.c.created)).mappings()
            return [JobRecord(**row) for row in rows]
