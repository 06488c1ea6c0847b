"""Draw jobs in the background, one after the other, and keep them over a restart of this process.

What a job needs is on disk before its client gets the id: the request in the feedback database, its pictures
in the run's storage. It has a seed from then on, so that a job that is drawn again gives the same pictures.
"""

import asyncio
import contextlib
import json
import logging
import random
import secrets
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TypeVar

from sqlalchemy.exc import SQLAlchemyError

from cluster.storage import Storage
from ray_jobs.config import ServeConfig
from serving.feedback.job_store import JobRecord, JobStore
from serving.jobs import OPEN, REQUESTS, Job, Kind
from serving.schemas import MAX_SEED, APIError, ErrorBody, ImageRequest, ImageResponse
from serving.service.background import Background
from serving.service.given_files import NO_FILES, GivenFiles
from serving.service.request_context import RequestContext
from serving.service.webhooks import Webhooks

AT_ONCE = 2  # jobs drawn at a time, beside other requests
PAUSE_S = 1.0  # before a job is tried again that found no room, in seconds
LATER = frozenset({"queue_full", "model_lost", "feedback_unavailable", "storage_unavailable"})
RESULT, GIVEN = "result.json", "given"  # in a job's folder: its answer, and the pictures that came with it

log = logging.getLogger("ray.serve")
T = TypeVar("T")
Generate = Callable[[ImageRequest, RequestContext, GivenFiles, float], Awaitable[ImageResponse]]
"""Draws a request in at most so many seconds, as `Service.generate` does."""


class Jobs:
    """All jobs of an endpoint. Use it from one event loop only.

    Args:
        folder: holds a folder per job, with its pictures and its result.
        generate: draws a request.
        webhooks: announces the end of jobs.
    """

    def __init__(
        self,
        store: JobStore,
        folder: Storage,
        generate: Generate,
        webhooks: Webhooks,
        settings: ServeConfig,
    ) -> None:
        self.store, self.folder, self.webhooks, self.settings = store, folder, webhooks, settings
        self._generate = generate
        self._queue: asyncio.Queue[JobRecord] = asyncio.Queue()
        self._drawing: dict[str, asyncio.Task[None]] = {}
        self._background = Background()

    async def run(self) -> None:
        """Continue the jobs of a former process, and draw new ones until cancelled."""
        while True:
            try:
                unfinished = await asyncio.to_thread(self.store.unfinished)
                break
            except SQLAlchemyError as error:
                log.warning("jobs of a former process wait for the database: %s", error)
                await asyncio.sleep(PAUSE_S)
        for job in unfinished:
            if job.state in OPEN:
                self._queue.put_nowait(job)
            else:
                self._background.start(self._announce(job))
        await asyncio.gather(*(self._work() for _ in range(AT_ONCE)))

    async def submit(
        self,
        kind: Kind,
        request: ImageRequest,
        context: RequestContext,
        files: GivenFiles = NO_FILES,
    ) -> Job:
        """Keep a job that was checked, and return it.

        Raises:
            APIError: 400, no webhook is sent to its address; 429 or 503, too many jobs are open, or it cannot
                be kept.
        """
        if request.webhook_url:
            await self.webhooks.check(request.webhook_url)
        if request.seed is None:
            request = request.model_copy(update={"seed": random.randint(0, MAX_SEED)})
        job = JobRecord(
            id=f"job-{secrets.token_hex(12)}",
            created=time.time(),
            key_id=context.owner,
            kind=kind,
            state="queued",
            request=request.model_dump_json(exclude_defaults=True),
            num_images=len(files.images),
            has_mask=int(files.mask is not None),
            base_url=context.base_url,
            webhook_url=request.webhook_url,
        )
        await self._stored(lambda: self._keep(job, files))
        self._queue.put_nowait(job)
        return self._shown(job)

    async def get(self, job_id: str, context: RequestContext) -> Job:
        """Return a job with its result.

        Raises:
            APIError: 404, the client has no such job.
        """
        return await self._stored(lambda: self._read(job_id, context))

    async def cancel(self, job_id: str, context: RequestContext) -> Job:
        """Cancel a job, unless it has ended, and return it.

        Raises:
            APIError: 404, the client has no such job.
        """
        await self.get(job_id, context)
        await self._end(job_id, "cancelled")
        if task := self._drawing.get(job_id):
            task.cancel()
        return await self.get(job_id, context)

    def delete_expired(self) -> None:
        """Delete the jobs that ended longer ago than they are kept; blocks."""
        for job_id in self.store.finished_before(time.time() - 3600 * self.settings.job_hours):
            self.folder.delete(job_id)
            self.store.delete(job_id)

    def _keep(self, job: JobRecord, files: GivenFiles) -> None:
        if self.store.num_open(job.key_id) >= self.settings.max_jobs:
            message = f"this client has {self.settings.max_jobs} open jobs, which is its limit"
            raise APIError(429, message, None, "concurrency_limit_exceeded", {"retry-after": "10"})
        named = {f"image-{number}": content for number, content in enumerate(files.images)}
        if files.mask is not None:
            named["mask"] = files.mask
        try:
            for name, content in named.items():
                self.folder.write_bytes(f"{job.id}/{GIVEN}/{name}", content)
            self.store.add(job)
        except Exception:
            with contextlib.suppress(OSError):  # the first error counts
                self.folder.delete(job.id)
            raise

    def _read(self, job_id: str, context: RequestContext) -> Job:
        job = self.store.get(job_id)
        if job is None or job.key_id != context.owner:
            raise APIError(404, f"{job_id}: there is no such job, or no longer", code="job_not_found")
        return self._shown(job)

    def _shown(self, job: JobRecord) -> Job:
        result = None
        if job.state == "completed":
            result = ImageResponse.model_validate_json(self.folder.read_bytes(f"{job.id}/{RESULT}"))
        return Job(
            id=job.id,
            status=job.state,
            created_at=int(job.created),
            finished_at=None if job.finished is None else int(job.finished),
            webhook_url=job.webhook_url,
            result=result,
            error=None if job.error is None else ErrorBody.model_validate_json(job.error),
        )

    async def _work(self) -> None:
        while True:
            job = await self._queue.get()
            begin = partial(self.store.change, job.id, only=OPEN, state="in_progress")
            if not await self._retried(begin):
                continue  # it was cancelled
            task = self._drawing[job.id] = asyncio.create_task(self._draw(job))
            try:
                await asyncio.wait([task])
            finally:
                task.cancel()  # if this process stops
                del self._drawing[job.id]

    async def _draw(self, job: JobRecord) -> None:
        """Draw a job to its end, whatever that is."""
        try:
            result = await self._drawn(job)
            content = result.model_dump_json().encode()
            await self._retried(lambda: self.folder.write_bytes(f"{job.id}/{RESULT}", content))
            await self._end(job.id, "completed")
        except APIError as error:
            shown = error.for_client(job.id)
            if shown is not error:
                log.exception("job %s failed", job.id)
            await self._fail(job, shown)
        except Exception:
            log.exception("job %s failed", job.id)
            message = f"internal error; the log has details under {job.id}"
            await self._fail(job, APIError(500, message, code="job_failed"))

    async def _fail(self, job: JobRecord, error: APIError) -> None:
        await self._end(job.id, "failed", json.dumps(error.body()["error"]))

    async def _drawn(self, job: JobRecord) -> ImageResponse:
        request = REQUESTS[job.kind].model_validate_json(job.request)
        files = await self._retried(partial(self._given, job))
        seconds = 60 * self.settings.job_minutes
        deadline = time.monotonic() + seconds
        while True:
            context = RequestContext(request_id=job.id, key_id=job.key_id, base_url=job.base_url)
            try:
                return await self._generate(request, context, files, seconds)
            except APIError as error:
                if error.code not in LATER or time.monotonic() > deadline:
                    raise
            await asyncio.sleep(PAUSE_S)

    def _given(self, job: JobRecord) -> GivenFiles:
        """Return the files that came with a job."""
        given = self.folder.child(job.id, GIVEN)
        images = tuple(given.read_bytes(f"image-{number}") for number in range(job.num_images))
        return GivenFiles(images, given.read_bytes("mask") if job.has_mask else None)

    async def _end(self, job_id: str, state: str, error: str | None = None) -> None:
        """Record the end of a job that has none, and announce it."""
        ended = {"state": state, "error": error, "finished": time.time(), "notified": 0}
        if await self._retried(lambda: self.store.change(job_id, only=OPEN, **ended)):
            job = await self._retried(partial(self.store.get, job_id))
            await self._retried(partial(self.folder.child(job_id).delete, GIVEN))
            if job is not None:
                self._background.start(self._announce(job))

    async def _announce(self, job: JobRecord) -> None:
        if job.webhook_url is not None:
            event: dict[str, object] = {
                "id": f"evt-{job.id}",
                "object": "event",
                "type": f"image.job.{job.state}",
                "created_at": int(job.finished or 0),
                "data": {"id": job.id},
            }
            if not await self.webhooks.send(job.webhook_url, f"evt-{job.id}", event, job.key_id):
                log.warning("job %s: its webhook was not taken", job.id)
        await self._retried(lambda: self.store.set_notified(job.id))

    async def _stored(self, work: Callable[[], T]) -> T:
        """Return what work in the database and the storage gives; blocking work runs in a thread.

        Raises:
            APIError: 503, they do not answer.
        """
        try:
            return await asyncio.to_thread(work)
        except (SQLAlchemyError, OSError) as error:
            log.error("a job was not kept or read: %s", error)
            raise APIError(503, "jobs cannot be kept; try again later", code="storage_unavailable") from error

    async def _retried(self, work: Callable[[], T]) -> T:
        """Return what work gives, once the database and the storage answer."""
        while True:
            with contextlib.suppress(APIError):
                return await self._stored(work)
            await asyncio.sleep(PAUSE_S)
