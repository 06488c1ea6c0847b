"""Run lease: at most one driver works on a run at a time.

`lease/<number>-<owner>.json` names the owner of the run, and is rewritten every few seconds (`beat`). A new
owner takes the next number. In a local folder the name is `lease/<number>.json`, created with O_EXCL, so only
one of two drivers succeeds. pyarrow offers no such operation for object stores: there each driver writes its
claim, then lists the folder, and withdraws if it sees another claim of the same number. Two drivers that
start in the same second may both be refused, but never both proceed, since listings of these stores include
all completed writes (S3 since 2020).

Clocks of other machines are not trusted. An owner counts as dead when its beat has not changed for `EXPIRY_S`
on the observer's clock, or at once when its process or its Ray job is known to have ended.
"""

import json
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from cluster.storage import Storage
from cluster.watch import STOP
from ray_jobs.config import ConfigError
from ray_jobs.console import say

LEASES = "lease"
BEAT_S = 10.0
EXPIRY_S = 60.0  # several beats, since a store may be slow or reject some


@dataclass(frozen=True)
class Owner:
    """A driver that holds a run, or claims it.

    Attributes:
        identity: random id of this attempt.
        host: host name.
        place: boot and process namespace in which `process` is valid.
        process: process id.
        started: start time of the process, in seconds since 1970 on its own machine.
        job: Ray job id; empty without Ray.
        cluster: Ray session of `job`.
        beat: counter that increases while the driver lives.
    """

    identity: str
    host: str
    place: str
    process: int
    started: float
    job: str = ""
    cluster: str = ""
    beat: int = 0

    @staticmethod
    def this() -> "Owner":
        """Return this process as an owner, with the job of the Ray that it has joined, if any."""
        job, cluster = _ray_job()
        process = psutil.Process()
        started = process.create_time()
        return Owner(
            uuid.uuid4().hex[:12], socket.gethostname(), _place(), process.pid, started, job, cluster
        )

    def describe(self) -> str:
        return f"process {self.process} on {self.host}" + (f", Ray job {self.job}" if self.job else "")


def _place() -> str:
    """Return an id of this boot and process namespace; containers differ in it."""
    boot, namespace = Path("/proc/sys/kernel/random/boot_id"), "/proc/self/ns/pid"
    if boot.exists():
        return f"{boot.read_text().strip()} {os.readlink(namespace)}"
    return f"{socket.gethostname()} {psutil.boot_time():.0f}"


def _ray_job() -> tuple[str, str]:
    """Return this driver's Ray job and session; empty strings if it has not joined Ray."""
    import ray

    if not ray.is_initialized():
        return "", ""
    session = ray._private.worker.global_worker.node.session_name
    return str(ray.get_runtime_context().get_job_id()), str(session)


def known_fate(owner: Owner, here: Owner) -> bool | None:
    """Return True if an owner is alive, False if it is dead, None if this process cannot know: the owner is
    neither on the same machine nor in the same Ray session."""
    if owner.place == here.place:
        try:
            return abs(psutil.Process(owner.process).create_time() - owner.started) < 1
        except psutil.NoSuchProcess:
            return False
    if owner.job and owner.cluster == here.cluster:
        from ray._private.state import state

        jobs = {job["JobID"]: job for job in state.job_table()}
        return owner.job in jobs and not jobs[owner.job]["IsDead"]
    return None


class Lease:
    """One driver's view of a run's lease.

    Args:
        run: the run's folder.
        beat_s: seconds between beats.
        expiry_s: seconds without a beat after which an owner counts as dead.
    """

    def __init__(
        self, run: Storage, owner: Owner, *, beat_s: float = BEAT_S, expiry_s: float = EXPIRY_S
    ) -> None:
        self.run, self.owner = run, owner
        self.beat_s, self.expiry_s = beat_s, expiry_s
        self.folder = run.child(LEASES)
        self.number, self.lost = 0, False
        self._done = threading.Event()
        self._beating = threading.Thread(target=self._beat, daemon=True)

    def take(self) -> None:
        """Acquire the lease, if necessary after waiting to see whether the former owner is still alive.

        Raises:
            ConfigError: another driver, which is named, holds the lease.
        """
        number = self._highest()
        if number:
            self._require_dead(number)
        self.number = number + 1
        if not self._claim():
            raise self._taken(self._read(self._highest()))
        for name in self._names():
            if _number(name) < self.number:
                self.folder.delete(name)
        self._beating.start()

    def release(self) -> None:
        """Release the lease."""
        self._done.set()
        self._beating.join()
        if not self.lost:
            self.folder.delete(self.name)

    @property
    def name(self) -> str:
        """File name of this owner's claim."""
        whose = "" if self.folder.is_local else f"-{self.owner.identity}"
        return f"{self.number:06d}{whose}.json"

    def _names(self) -> list[str]:
        return [name for name in self.folder.files() if name.endswith(".json")]

    def _highest(self) -> int:
        return max((_number(name) for name in self._names()), default=0)

    def _read(self, number: int) -> Owner | None:
        """Return the owner of a number; None if it was released, or is just being written."""
        for name in self._names():
            if _number(name) == number:
                try:
                    return Owner(**json.loads(self.folder.read_text(name)))
                except (OSError, json.JSONDecodeError):  # the file may be deleted meanwhile
                    return None
        return None

    def _require_dead(self, number: int) -> None:
        """Return once `number` is released or its owner counts as dead; raise ConfigError if it is alive."""
        first = self._read(number)
        fate = known_fate(first, self.owner) if first else None
        if fate is False:
            return
        if fate:
            raise self._taken(first)
        who = first.describe() if first else "another driver"
        say("lease", f"{who} holds this run; waiting {self.expiry_s:.0f} s to see whether it is alive")
        deadline = time.monotonic() + self.expiry_s
        while time.monotonic() < deadline:
            time.sleep(min(self.beat_s, self.expiry_s) / 4)
            now, highest = self._read(number), self._highest()
            if highest > number or (now and first and now != first):
                raise self._taken(self._read(highest))
            if highest < number:  # released meanwhile
                return
            first = now or first

    def _taken(self, owner: Owner | None) -> ConfigError:
        who = owner.describe() if owner else "another driver that has just started"
        return ConfigError(
            f"name: the run {self.run.uri} is in use by {who}; wait until it ends, stop it, or choose "
            "another name"
        )

    def _claim(self) -> bool:
        """Write this owner's claim; return False if another driver claimed the number too."""
        content = json.dumps(asdict(self.owner))
        if not self.folder.is_local:
            self.folder.write_text(self.name, content)
            others = [name for name in self._names() if _number(name) >= self.number and name != self.name]
            if others:
                self.folder.delete(self.name)
            return not others
        path = Path(self.folder.path, self.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(content)
        except FileExistsError:
            return False
        return True

    def _beat(self) -> None:
        """Update the beat until `release`. If another driver has taken over the run, stop this process's
        stage, which must write no more."""
        while not self._done.wait(self.beat_s):
            try:
                if self._highest() > self.number or not self.folder.exists(self.name):
                    self.lost = True
                    os.kill(os.getpid(), STOP)
                    return
                self.owner = replace(self.owner, beat=self.owner.beat + 1)
                self.folder.write_text(self.name, json.dumps(asdict(self.owner)))
            except OSError as error:  # the next beat may succeed; after too many failures the lease is lost
                say("lease", f"{self.folder.uri} cannot be written: {' '.join(str(error).split())}")


def _number(name: str) -> int:
    return int(name[:6])


def holder(run: Storage) -> Owner | None:
    """Return the owner of a run's lease; None if it has ended, is this process, or nobody has the lease."""
    here = Owner.this()
    lease = Lease(run, here)
    owner = lease._read(lease._highest())
    if owner is None or (owner.place, owner.process) == (here.place, here.process):
        return None
    return None if known_fate(owner, here) is False else owner


@contextmanager
def held(run: Storage, **times: Any) -> Iterator[None]:
    """Hold the lease of a run within the block.

    Args:
        run: the run's folder.
        times: `beat_s` and `expiry_s` of `Lease`.

    Raises:
        ConfigError: another driver holds the lease.
        RuntimeError: another driver took over, since this process missed its beats for too long.
    """
    lease = Lease(run, Owner.this(), **times)
    lease.take()
    # A KeyboardInterrupt, because no other exception of a signal handler gets through Ray's waiting.
    former = signal.signal(STOP, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        if lease.lost:
            raise RuntimeError(
                f"{lease.run.uri} was taken over by another driver, because this one did not renew its lease"
            ) from None
        raise
    finally:
        lease.release()
        signal.signal(STOP, former)
