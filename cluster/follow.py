"""Follow a job's log to the job's end, across lost connections."""

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
"""Interval between attempts to reach a cluster, in seconds."""

QUIET_S = 120
"""Time without a log line, in seconds, after which the job's status is queried: a connection that an
intermediary has dropped gives no error."""

UNREACHED = (OSError, RuntimeError, RayError, aiohttp.ClientError)
"""Errors of Ray's client while it cannot reach the cluster, or while a proxy answers in the cluster's place;
those of `requests` are OSErrors, those of the log's web socket are not."""


class ConnectionLost(Exception):
    """The cluster was unreachable for too long; the job may still be running."""


@dataclass
class Follower:
    """Print a job's log as it grows. After each reconnect the cluster sends the log from its beginning.

    Attributes:
        printed: number of characters of the log printed so far.
        lost_s: seconds without a connection until ConnectionLost is raised.
    """

    client: "JobSubmissionClient"
    job: str
    lost_s: float
    printed: int = 0
    _lost_at: float | None = None

    def follow(self) -> "JobDetails":
        """Print the log until the job ends, and return the job's final details.

        Raises:
            ConnectionLost: no answer for `lost_s` seconds.
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
        """Print new log text until the log ends or the connection is lost; return the job's details then."""
        broken = None
        try:
            await self._tail()
        except UNREACHED as error:
            broken = error
        details = self.client.get_job_info(self.job)
        if details.status.is_terminal():  # the log stream ends without an error if its node has gone
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
                return  # the job's status shows whether the job ended, is silent, or the connection hangs
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
            _tell(f"connection lost, retrying for {self.lost_s:.0f} s: {one_line(error)}")
        elif time.monotonic() - self._lost_at > self.lost_s:
            raise ConnectionLost(one_line(error)) from None

    def _back(self) -> None:
        if self._lost_at is not None:
            _tell(f"reconnected after {time.monotonic() - self._lost_at:.0f} s")
            self._lost_at = None


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _print(text: str) -> None:
    """Print to stdout, without the two lines that Ray puts before the job's own output."""
    for line in text.splitlines(keepends=True):
        if "-- Runtime env is setting up." in line or line.startswith("Running entrypoint for job "):
            continue
        sys.stdout.write(line)
    sys.stdout.flush()
