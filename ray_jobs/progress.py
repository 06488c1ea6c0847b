"""What a person sees of a run: one line an event, the stage first."""

import logging
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_STARTED = time.monotonic()
_phases = [("starting", _STARTED)]
_terminal: TextIO | None = None  # where lines go once the frameworks' output was turned to a file


def clock(seconds: float) -> str:
    """75.2 -> `1:15`."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def quiet_logs() -> Path:
    """Send all that frameworks print and log in this process to a file; only `show` and `say` are seen.

    The file descriptors are turned, since native code and Ray's own printing know no Python logging.
    """
    global _terminal
    descriptor, name = tempfile.mkstemp(prefix="diffray-", suffix=".log")
    sys.stdout.flush()
    sys.stderr.flush()
    _terminal = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    logging.basicConfig(filename=name, level=logging.INFO, format=LOG_FORMAT)
    logging.captureWarnings(True)
    return Path(name)


def show(line: str) -> None:
    """Print a line that a person must see."""
    print(line, file=_terminal or sys.stdout, flush=True)


def complain(error: Exception) -> int:
    """Print what the user must mend, and return a command's exit code for that."""
    show(f"error: {error}")
    return 2


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of cells, each column as wide as its widest one."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def say(stage: str, message: str) -> None:
    """Print one progress line, with the time since the start of the job."""
    show(f"[{clock(time.monotonic() - _STARTED):>5}] {stage:<8} {message}")


def phase(name: str) -> None:
    """Begin a phase on a run's way to its first training step."""
    _phases.append((name, time.monotonic()))


def tell_phases() -> None:
    """Say how long each phase took until now, the first time that a training step was made."""
    if len(_phases) > 1:
        ends = [begun for _, begun in _phases[1:]] + [time.monotonic()]
        took = [f"{name} {clock(end - begun)}" for (name, begun), end in zip(_phases, ends, strict=True)]
        say("train", f"first steps; until here {', '.join(took)}")
    _phases.clear()


@dataclass(frozen=True)
class TrainingProgress:
    """Where a training is, as its rank 0 reports it.

    Attributes:
        waiting: share of the time since the last checkpoint that was spent waiting for data.
        memory_gib: of rank 0, on its device.
    """

    trial_id: str
    step: int
    last_step: int
    next_rung: int
    loss: float
    grad_norm: float
    learning_rate: float
    images_per_second: float
    waiting: float
    memory_gib: float
    seconds_left: float

    def line(self) -> str:
        return (
            f"{self.trial_id}  step {self.step}/{self.last_step}  rung {self.next_rung}  "
            f"loss {self.loss:.4f}  gradient {self.grad_norm:.2g}  rate {self.learning_rate:.2g}  "
            f"{self.images_per_second:.0f} images/s ({self.waiting:.0%} waiting)  {self.memory_gib:.1f} GiB  "
            f"{clock(self.seconds_left)} left"
        )


@dataclass
class ProgressBoard:
    """An actor that keeps the latest line of every training, and counts steps; the driver reads it."""

    lines: dict[str, str] = field(default_factory=dict)
    steps: dict[str, int] = field(default_factory=dict)

    def post(self, trial_id: str, line: str) -> None:
        self.lines[trial_id] = line

    def take(self) -> list[str]:
        """The lines since the last call."""
        lines, self.lines = list(self.lines.values()), {}
        return lines

    def count(self, trial_id: str) -> None:
        """Count a step that a training has computed."""
        self.steps[trial_id] = self.steps.get(trial_id, 0) + 1

    def take_steps(self) -> dict[str, int]:
        """The steps that were computed since the last call, by training."""
        steps, self.steps = self.steps, {}
        return steps


@contextmanager
def watched_board() -> Iterator[Any]:
    """A ProgressBoard actor whose lines are printed every five seconds while the block lasts."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # Beside the driver: another node could be taken away, and what was counted with it.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    remote = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1, scheduling_strategy=here)
    board = remote(ProgressBoard).remote()
    done = threading.Event()
    watcher = threading.Thread(target=_watch, args=(board, done), daemon=True)
    watcher.start()
    try:
        yield board
    finally:
        done.set()
        watcher.join()
        ray.kill(board)


def _watch(board: Any, done: threading.Event) -> None:
    import ray

    while not done.wait(5):
        for line in ray.get(board.take.remote()):
            tell_phases()
            say("train", line)
