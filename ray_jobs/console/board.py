"""Progress board of a run: the latest line of every training, and the number of steps it has computed."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ray_jobs.console import clock, say, tell_phases

if TYPE_CHECKING:
    from ray.actor import ActorHandle


@dataclass(frozen=True)
class TrainingProgress:
    """Progress of a training, as reported by its rank 0.

    Attributes:
        waiting: share of the time since the last checkpoint that was spent waiting for data.
        memory_gib: device memory of rank 0 in GiB; on a CPU without what it shares, as the object store.
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
    """Actor that keeps the latest progress of every training, messages and steps; the driver reads it."""

    lines: dict[str, str] = field(default_factory=dict)
    progress: dict[str, str] = field(default_factory=dict)
    steps: dict[str, int] = field(default_factory=dict)

    def post(self, key: str, line: str) -> None:
        """Keep a message until it is taken; one of the same key replaces it."""
        self.lines[key] = line

    def show(self, trial_id: str, line: str) -> None:
        """Keep the progress of a training."""
        self.progress[trial_id] = line

    def take(self) -> list[str]:
        """Return the messages since the last call, and the progress of one training: of several in turn."""
        lines, self.lines = list(self.lines.values()), {}
        if self.progress:
            lines.append(self.progress.pop(next(iter(self.progress))))
        return lines

    def count(self, trial_id: str) -> None:
        """Count a step that a training has computed."""
        self.steps[trial_id] = self.steps.get(trial_id, 0) + 1

    def take_steps(self) -> dict[str, int]:
        """Return the number of steps computed since the last call, by training."""
        steps, self.steps = self.steps, {}
        return steps


@contextmanager
def watched_board() -> Iterator["ActorHandle"]:
    """Yield a ProgressBoard actor, from which lines are printed every five seconds until the block ends."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # On the driver's node: another node could be lost, and the counts with it.
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


def _watch(board: "ActorHandle", done: threading.Event) -> None:
    import ray

    while not done.wait(5):
        for line in ray.get(board.take.remote()):
            tell_phases()
            say("train", line)
