"""States of runs on clusters."""

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

from diffray.jobs import Job, Record
from ray_jobs.config import ConfigError

State = Literal["waiting", "running", "finished", "failed", "stopped", "unreached"]
ENDED = ("finished", "failed", "stopped")
ASKED_S = 5.0
"""Interval between questions to a cluster about a job, in seconds."""


class ClusterStates:
    """States of jobs on clusters, asked in the background: one that does not answer delays no page."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(4, thread_name_prefix="clusters")
        self._found: dict[str, tuple[Record, State, str]] = {}
        self._asked: dict[str, float] = {}

    def state(self, job: Job, record: Record) -> tuple[State, str]:
        """Return the last known state of a job, and what prevents a newer one."""
        key = str(job.folder)
        former = self._found.get(key)
        known = former if former and former[0] == record else None
        if known and known[1] in ENDED:
            return known[1:]
        if time.monotonic() > self._asked.get(key, 0.0):
            self._asked[key] = float("inf")  # until it has answered
            self._pool.submit(self._ask, key, job, record)
        return known[1:] if known else ("unreached", f"asking {record.address}")

    def _ask(self, key: str, job: Job, record: Record) -> None:
        try:
            self._found[key] = (record, job.status, "")
        except (ConfigError, OSError, RuntimeError) as error:
            self._found[key] = (record, "unreached", f"{record.address}: {error}")
        finally:
            self._asked[key] = time.monotonic() + ASKED_S
