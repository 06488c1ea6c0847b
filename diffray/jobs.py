"""Jobs that go on without the process that started them, here or on a cluster, and are found again by name.

A job's record is a folder below `.diffray/` in `home()`: `job.json` and, on this machine, `log` and `exit`.
"""

import hashlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from shutil import rmtree
from typing import TYPE_CHECKING, Literal

import psutil

from ray_jobs.config import ConfigError, home

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

RECORDS = ".diffray"
JOB = "job.json"
STOP_S = 120
"""Timeout while a job stops, in seconds: it stops its Ray in an orderly way."""

POLL_S = 1.0
"""Interval between looks at a job that is waited for, in seconds."""

LINE = 16_384
"""Bytes at the end of a log in which its last line is looked for."""

HELD = 'read -r _ && { "$@" </dev/null; echo $? > "$0"; }'
"""Shell script that runs a command once it has read a line, and then writes its exit code to a file."""

Status = Literal["running", "finished", "failed", "stopped"]


class JobFailed(RuntimeError):
    """A job ended with an error; the message is its last line."""


@dataclass(frozen=True)
class Record:
    """How a job was started (job.json).

    Attributes:
        arguments: arguments of the stage, `--config` first.
        address: Jobs API of its cluster; None: this machine.
        job: id of the job on the cluster.
        process: id of the process on this machine, and its start in seconds since 1970.
    """

    arguments: list[str]
    address: str | None = None
    job: str = ""
    process: int = 0
    started: float = 0.0


class Job:
    """A job, running or ended.

    Args:
        name: folder of its record, below `.diffray/`.
    """

    def __init__(self, name: str) -> None:
        self.folder = home() / RECORDS / name

    @property
    def record(self) -> Record | None:
        """How it was started; None if it never was.

        Raises:
            ConfigError: its file is damaged.
        """
        file = self.folder / JOB
        try:
            return Record(**json.loads(file.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError):
            raise ConfigError(f"{file}: damaged; delete {self.folder}, and start the run again") from None

    def start(self, module: str, arguments: list[str], address: str | None, *, submit: bool) -> None:
        """Run `python -m module arguments` in the background.

        Args:
            submit: on this machine, run it as a job of an embedded Ray, as `cluster.submit` does.

        Raises:
            ConfigError: the cluster at `address` is not reached, or refuses the job.
        """
        command = ["python", "-m", module, *arguments]
        if address:
            from cluster.submit import start_job

            job = start_job(address, command, arguments[1], self._id(command))
            self._write(Record(arguments, address, job))
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "exit").unlink(missing_ok=True)
        if submit:
            command = ["python", "-m", "cluster.submit", "--", *command]
        shell = self._spawn([sys.executable, *command[1:]])
        process = psutil.Process(shell.pid)
        self._write(Record(arguments, process=process.pid, started=process.create_time()))
        assert shell.stdin
        with shell.stdin:
            shell.stdin.write(b"\n")

    def _id(self, command: list[str]) -> str:
        """Return the name by which a cluster tells this job of this folder from all others."""
        own = json.dumps([socket.gethostname(), str(self.folder), command])
        name = str(self.folder.relative_to(home() / RECORDS)).replace("/", "-")
        return f"diffray-{name}-{hashlib.sha256(own.encode()).hexdigest()[:8]}"

    def _write(self, record: Record) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(asdict(record), indent=2) + "\n"
        aside = self.folder / f"{JOB}.new"
        aside.write_text(text, encoding="utf-8")
        aside.replace(self.folder / JOB)  # others read it meanwhile

    def _spawn(self, command: list[str]) -> "subprocess.Popen[bytes]":
        """Start a process in a session of its own, which an interrupt or the end of this one does not reach.

        Where the parent is gone its exit code is lost, so a shell writes that. It waits for a line before it
        runs the command: if this process is killed before it has written the record, nothing runs that would
        be started a second time.
        """
        code = str(Path(__file__).resolve().parents[1])
        paths = [code, *filter(None, [os.environ.get("PYTHONPATH")])]
        with (self.folder / "log").open("wb") as log:
            return subprocess.Popen(
                ["sh", "-c", HELD, str(self.folder / "exit"), *command],
                cwd=home(),
                env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"},
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def status(self) -> Status:
        """State of the job; stopped: by a person, or by the end of its machine or cluster."""
        record = self.started
        if record.address:
            from cluster.submit import job_status

            if (found := job_status(_client(record.address), record.job)) is None:
                return "stopped"
            states: dict[str, Status] = {"SUCCEEDED": "finished", "FAILED": "failed", "STOPPED": "stopped"}
            return states.get(found.value, "running")
        alive = self._shell(record) is not None
        code = ""
        with suppress(FileNotFoundError):
            code = (self.folder / "exit").read_text(encoding="utf-8").strip()
        if not code:
            return "running" if alive else "stopped"
        ended: dict[str, Status] = {"0": "finished", "130": "stopped", "143": "stopped"}
        return ended.get(code, "failed")

    @property
    def started(self) -> Record:
        """How it was started; for jobs that were.

        Raises:
            ConfigError: its file is damaged, or was deleted meanwhile.
        """
        if (record := self.record) is None:
            raise ConfigError(f"{self.folder.name}: it was deleted")
        return record

    @staticmethod
    def _shell(record: Record) -> psutil.Process | None:
        """Return the process of a job on this machine; None if it has ended."""
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(record.process)
            same = abs(process.create_time() - record.started) < 1
            return process if same and process.status() != psutil.STATUS_ZOMBIE else None
        return None

    def log(self, last: int | None = None) -> str:
        """Return what the job has printed.

        Args:
            last: only so many bytes of its end, without a line that they cut.
        """
        record = self.started
        if record.address:
            text = str(_client(record.address).get_job_logs(record.job))
            return text if last is None else text[-last:]
        with suppress(FileNotFoundError), (self.folder / "log").open("rb") as file:
            if last is not None and (size := file.seek(0, os.SEEK_END)) > last:
                file.seek(size - last)
                file.readline()
            else:
                file.seek(0)
            return file.read().decode(errors="replace")
        return ""

    def last_line(self) -> str:
        """Return the last line that the job has printed."""
        return (self.log(LINE).strip().splitlines() or [""])[-1]

    def follow(self) -> Iterator[str]:
        """Yield what the job prints, as it does, until it ends."""
        seen, running = 0, True
        while running:
            running = self.status == "running"
            text = self.log()
            if text[seen:]:
                yield text[seen:]
            seen = len(text)
            if running:
                time.sleep(POLL_S)

    def stop(self) -> None:
        """Stop the job, and wait until it has ended; one that has ended stays as it is.

        Raises:
            JobFailed: it does not stop.
        """
        record = self.started
        if self.status != "running":
            return
        if record.address:
            _client(record.address).stop_job(record.job)
        deadline, told = time.monotonic() + STOP_S, set[int]()
        while self.status == "running":
            if shell := None if record.address else self._shell(record):
                with suppress(psutil.NoSuchProcess):
                    # Looked for again, since a shell that has just started has no child yet.
                    for process in (each for each in shell.children() if each.pid not in told):
                        told.add(process.pid)
                        process.terminate()
            if time.monotonic() > deadline:
                raise JobFailed(
                    f"{self.folder.name}: still running after {STOP_S} s; its log: {self.folder}/log"
                )
            time.sleep(0.2)

    def forget(self) -> None:
        """Delete the record.

        Raises:
            ConfigError: the job is running.
        """
        if self.record and self.status == "running":
            raise ConfigError(f"{self.folder.name}: it is running; stop it first")
        rmtree(self.folder, ignore_errors=True)


@cache
def _client(address: str) -> "JobSubmissionClient":
    from cluster.submit import connected

    return connected(address)


def names() -> list[str]:
    """Return the names of all runs with a record here."""
    return sorted(path.parent.name for path in (home() / RECORDS).glob(f"*/{JOB}"))
