"""The board of a run: the latest line of every training, and the steps that they have computed."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from ray_jobs.console import clock, say, tell_phases


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
