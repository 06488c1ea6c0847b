"""Runs that wait until this machine is free, in the order in which they were asked for.

A waiting run is a file, `.diffray/<run>/waiting.json`, so a page that is started again finds it. It becomes a
run by `diffray.api.begin`, as `diffray.fit` starts one.
"""

import fcntl
import json
import logging
import threading
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from diffray import jobs
from diffray.api import begin, startable
from diffray.runs import Run
from ray_jobs.config import ConfigError, home

FILE = "waiting.json"
LOCK = ".page.lock"  # no run has a name like this
LOOK_S = 1.0
"""Interval between looks for room on this machine, in seconds."""


@dataclass(frozen=True)
class Waiting:
    """A run that is not started yet.

    Attributes:
        arguments: arguments of the stage, `--config` first.
        asked: when, in seconds since 1970.
        problem: why it could not be started; empty while it waits.
    """

    arguments: list[str]
    asked: float
    problem: str = ""


class Queue:
    """Starts waiting runs, at most some of this machine's at once, from `start` until it is closed.

    Args:
        at_once: runs on this machine at once, those that were started elsewhere from this folder included.

    Raises:
        ConfigError: another page does that for this folder.
    """

    def __init__(self, at_once: int) -> None:
        self.at_once = at_once
        self._lock, self._closed = threading.Lock(), threading.Event()
        folder = _records()
        folder.mkdir(parents=True, exist_ok=True)
        self._held = (folder / LOCK).open("w", encoding="utf-8")
        try:
            fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._held.close()
            raise ConfigError(
                f"{folder}: another page is open for this folder; use that one, or stop it"
            ) from None
        self._thread = threading.Thread(target=self._watch, name="queue", daemon=True)

    def start(self) -> None:
        """Look for room until the queue is closed, in a thread of its own."""
        self._thread.start()

    def close(self) -> None:
        """Start no more runs; those that run go on, and those that wait are kept."""
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()
        self._held.close()

    def add(self, arguments: list[str]) -> Run:
        """Let a run wait for room on this machine; one that runs or waits already is returned.

        Raises:
            ConfigError: a setting is wrong, or another run of this name was started or waits.
        """
        with self._lock:
            run = startable(arguments, None)
            if run.job.record and run.status == "running":
                return run
            former = read(run.name)
            if former and not former.problem:
                if former.arguments != arguments:
                    raise ConfigError(
                        f"name: {run.name}: a run of this name waits with other settings; give another name"
                    )
                return run
            _write(run.name, Waiting(arguments, time.time()))
        return run

    def remove(self, name: str) -> None:
        """Let a run wait no longer."""
        with self._lock:
            (_records() / name / FILE).unlink(missing_ok=True)

    def _watch(self) -> None:
        while not self._closed.wait(LOOK_S):
            try:
                self.start_next()
            except Exception:  # as when a run is deleted while it is looked at; others still wait
                logging.exception("the queue could not look for room, and looks again")

    def start_next(self) -> None:
        """Start waiting runs while there is room."""
        with self._lock:
            ready = [name for name, each in waiting().items() if not each.problem]
            if not ready:
                return
            for name in ready[: max(0, self.at_once - _running_here())]:
                asked = read(name)
                assert asked
                try:
                    begin(asked.arguments, None)
                except (ConfigError, OSError) as error:  # a recipe that is gone, a full disk
                    _write(name, replace(asked, problem=str(error)))
                else:
                    (_records() / name / FILE).unlink()


def _records() -> Path:
    return home() / jobs.RECORDS


def _running_here() -> int:
    return sum(_is_running_here(Run(name)) for name in jobs.names())


def _is_running_here(run: Run) -> bool:
    try:
        return run.job.started.address is None and run.status == "running"
    except ConfigError:  # its record is damaged, which the list shows, or was deleted meanwhile
        return False


def waiting() -> dict[str, Waiting]:
    """Return all runs that wait, by name, the next one first."""
    names = [path.parent.name for path in _records().glob(f"*/{FILE}")]
    found = {name: each for name in names if (each := read(name))}
    return dict(sorted(found.items(), key=lambda item: item[1].asked))


def read(name: str) -> Waiting | None:
    """Return a waiting run; None if none of that name waits. A damaged file is the run's problem."""
    file = _records() / name / FILE
    try:
        return Waiting(**json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):
        return Waiting([], 0.0, f"{file}: damaged; delete this run, and ask for it again")


def _write(name: str, asked: Waiting) -> None:
    folder = _records() / name
    folder.mkdir(parents=True, exist_ok=True)
    aside = folder / f"{FILE}.new"
    aside.write_text(json.dumps(asdict(asked), indent=2) + "\n", encoding="utf-8")
    aside.replace(folder / FILE)
