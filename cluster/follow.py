"""Follow a job's log to the job's end, whatever becomes of the connection meanwhile."""

import asyncio
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import aiohttp
from ray.exceptions import RayError

from cluster.connect import one_line

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

RETRY_S = 2
"""From one attempt to reach a cluster to the next, in seconds."""

QUIET_S = 120
"""After which without a line the cluster is asked whether the job still runs, in seconds: of a connection
that something on the way has dropped nobody is told."""

UNREACHED = (OSError, RuntimeError, RayError, aiohttp.ClientError)
"""What Ray's client raises while it cannot reach the cluster, or what stands before it answers in its place;
those of `requests` are OSErrors, those of the log's web socket are not."""


class ConnectionLost(Exception):
    """The cluster was out of reach for too long; the job may be running."""


@dataclass
class Follower:
    """Prints a job's log as it grows. The cluster sends it from its beginning after each loss.

    Attributes:
        printed: characters of the log.
        lost_s: seconds without the cluster until that is an error.
    """

    client: "JobSubmissionClient"
    job: str
    lost_s: float
    printed: int = 0
    _lost_at: float | None = None

    def follow(self) -> "JobDetails":
        """The job as it ended, with all of its log printed.

        Raises:
            ConnectionLost: no answer for `lost_s`.
        """
        while True:
            try:
                details = asyncio.run(self._round())
            except UNREACHED as error:
                self._lost(error)
                time.sleep(RETRY_S)
                continue
            self._back()
            if details.status.is_terminal():
                return details
            time.sleep(0.5)

    async def _round(self) -> "JobDetails":
        """Print what is new until the log's end or the loss of the connection; how the job is then."""
        broken = None
        try:
            await self._tail()
        except UNREACHED as error:
            broken = error
        details = self.client.get_job_info(self.job)
        if details.status.is_terminal():  # the log's stream ends without an error where a node of it has gone
            self._print_rest()
        elif broken:
            raise broken
        return details

    async def _tail(self) -> None:
        seen = 0
        stream = aiter(self.client.tail_job_logs(self.job))
        while True:
            try:
                chunk = await asyncio.wait_for(anext(stream), QUIET_S)
            except (StopAsyncIteration, TimeoutError):
                return  # the job's status tells whether it is the end, silence, or a connection that hangs
            self._back()
            fresh = chunk[max(0, self.printed - seen) :]
            seen += len(chunk)
            self.printed = max(self.printed, seen)
            _print(fresh)

    def _print_rest(self) -> None:
        try:
            log = self.client.get_job_logs(self.job)
        except UNREACHED as error:
            _tell(f"the end of the job's log cannot be read: {one_line(error)}")
        else:
            _print(log[self.printed :])

    def _lost(self, error: BaseException) -> None:
        if self._lost_at is None:
            self._lost_at = time.monotonic()
            _tell(f"connection lost, trying for {self.lost_s:.0f} s to take it up again: {one_line(error)}")
        elif time.monotonic() - self._lost_at > self.lost_s:
            raise ConnectionLost(one_line(error)) from None

    def _back(self) -> None:
        if self._lost_at is not None:
            _tell(f"connected again after {time.monotonic() - self._lost_at:.0f} s")
            self._lost_at = None


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _print(text: str) -> None:
    """To stdout, without the two lines that Ray itself puts before the job's first."""
    for line in text.splitlines(keepends=True):
        if "-- Runtime env is setting up." in line or line.startswith("Running entrypoint for job "):
            continue
        sys.stdout.write(line)
    sys.stdout.flush()
