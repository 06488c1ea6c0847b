"""Training metrics (loss, gradient norm, speed, waiting for data), and when to stop or to save."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import torch

from ray_jobs.config import TrainConfig
from ray_jobs.console.board import TrainingProgress
from ray_jobs.run.records import Progress
from ray_jobs.training.memory import state_bytes
from ray_jobs.training.startup import StartUp

POST_EVERY = 2.0  # seconds between progress lines, and between checks for a preemption
SMOOTHED = 20  # steps over which the displayed loss is averaged
ENOUGH = 64  # images after which a mean loss is comparable, if that is fewer than SMOOTHED steps
EXPLODED = 5.0  # multiple of the lowest smoothed loss at which the loss counts as diverged
RUNG, INTERVAL, PREEMPTION = "rung", "interval", "preemption"  # why a checkpoint is written

Series = list[dict[str, float]]
"""One row per step: step, loss, grad_norm, learning_rate, time."""


class Diverged(RuntimeError):
    """The loss or its gradient is not finite, or the loss has exploded."""


class Meter:
    """Metrics of a training as shown to the user. Every rank has one, and all agree on when to save.

    Args:
        board: handle of a ProgressBoard, or None.
        startup: stopwatch of this worker's start-up phases.
    """

    def __init__(
        self,
        trial_id: str,
        ladder: list[int],
        config: TrainConfig,
        board: Any,
        rank: int,
        startup: StartUp,
    ) -> None:
        self.startup: StartUp | None = startup  # None once a checkpoint has recorded it
        self.trial_id, self.ladder, self.config, self.board, self.rank = trial_id, ladder, config, board, rank
        self.warming_up = True  # the first step compiles and fills caches, so it is not timed
        self.posted_at = self.saved_at = time.monotonic()
        self.saved_step = 0
        self.lowest = math.inf
        self.recent: list[float] = []
        self.preempted = False

    def start(self, engine: Any) -> None:
        """Start measuring the steps of an engine, and report what it keeps in memory."""
        self.engine, self.state_bytes = engine, state_bytes(engine)
        if self.rank == 0 and self.board is not None:
            kept = ", ".join(f"{what} {size / 2**20:.0f} MiB" for what, size in self.state_bytes.items())
            line = f"{self.trial_id}  {engine.world_size} workers; rank 0 keeps: {kept}"
            self.board.post.remote(f"{self.trial_id}/memory", line.replace("_", " "))
        self._restart()

    def _restart(self) -> None:
        self.series: Series = []
        self.seconds, self.waited, self.last = 0.0, 0.0, time.monotonic()

    def go_on(self) -> None:
        """Resume measuring after a pause, which is not counted as step time."""
        self.last = self.saved_at = time.monotonic()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time a block that waits for data."""
        begin = time.monotonic()
        yield
        self.waited += time.monotonic() - begin
        if self.startup:
            self.startup.done("first_row")

    def add(self, step: int, rate: float, share: torch.Tensor) -> str:
        """Record a step; return why a checkpoint is due (INTERVAL, PREEMPTION) or "", the same on all ranks.

        Args:
            share: this rank's share of the step's loss.

        Raises:
            Diverged: on all ranks at once.
        """
        now = time.monotonic()
        if self.startup:
            self.startup.done("first_step")
        if not self.series and self.warming_up:
            self.waited, self.saved_at = 0.0, now
        else:
            self.seconds += now - self.last
        self.last = now
        look = self.rank == 0 and now - self.posted_at > POST_EVERY
        due = self.rank == 0 and now - self.saved_at > 60 * self.config.checkpoint_minutes
        loss, look, due = self._agreed(share, look, due)
        if self.rank == 0 and self.board is not None:
            self.board.count.remote(self.trial_id)
        norm = float(self.engine.get_global_grad_norm())
        self._watch(step, loss, norm)
        self.series.append(
            {"step": step, "loss": loss, "grad_norm": norm, "learning_rate": rate, "time": time.time()}
        )
        preempted = False
        if look:
            self.posted_at = now
            preempted = self._preempted()
            if self.rank == 0 and self.board is not None and self.seconds:
                self.board.post.remote(self.trial_id, self._progress().line())
        if due or preempted:
            self.saved_at = now
        return PREEMPTION if preempted else INTERVAL if due else ""

    def _agreed(self, share: torch.Tensor, look: bool, due: bool) -> tuple[float, bool, bool]:
        """Return the loss summed over all ranks, and the flags that rank 0 set by its clock."""
        both = torch.stack([share.float(), *(share.new_tensor(float(flag)) for flag in (look, due))])
        if self.engine.world_size > 1:
            torch.distributed.all_reduce(both)
        loss, look_too, due_too = both.tolist()
        return loss, bool(look_too), bool(due_too)

    def _preempted(self) -> bool:
        """Return whether a preemption notice has arrived since the last check."""
        import ray.train

        known, self.preempted = self.preempted, ray.train.get_preemption_info() is not None
        return self.preempted and not known

    def _watch(self, step: int, loss: float, norm: float) -> None:
        self.recent = [*self.recent[-SMOOTHED + 1 :], loss]
        smoothed = sum(self.recent) / len(self.recent)
        if len(self.recent) >= min(SMOOTHED, ENOUGH / self.config.batch_size):
            self.lowest = min(self.lowest, smoothed)
        if not math.isfinite(loss):
            what = "is not a number"
        elif smoothed > EXPLODED * self.lowest:
            what = f"rose to {smoothed:.3g}"
        elif not math.isfinite(norm) and self.config.precision != "fp16":
            # ZeRO skips such steps; with fp16 that is normal until the loss scale fits.
            what = "has a gradient that is not finite"
        else:
            return
        good = (
            f"the last checkpoint is that of step {self.saved_step}" if self.saved_step else "none was saved"
        )
        raise Diverged(
            f"the loss {what} at step {step}; {good}. Likely causes: a learning rate that is too high "
            "(lower train.learning_rate or give train.warmup_steps), gradients that are let through "
            f"(train.max_grad_norm is {self.config.max_grad_norm:g}), "
            f"train.precision: {self.config.precision}"
        )

    @property
    def seconds_per_step(self) -> float:
        return self.seconds / max(1, len(self.series) - self.warming_up)

    @property
    def images_per_second(self) -> float:
        return self.config.batch_size / self.seconds_per_step if self.seconds else 0.0

    def _progress(self) -> TrainingProgress:
        last = self.series[-1]
        step = int(last["step"])
        return TrainingProgress(
            self.trial_id,
            step,
            self.ladder[-1],
            min(rung for rung in self.ladder if rung >= step),
            loss=sum(self.recent) / len(self.recent),
            grad_norm=last["grad_norm"],
            learning_rate=last["learning_rate"],
            images_per_second=self.images_per_second,
            waiting=self.waited / self.seconds,
            memory_gib=memory_gib(self.engine.device),
            seconds_left=(self.ladder[-1] - step) * self.seconds_per_step,
        )

    def metrics(self, why: str) -> tuple[Progress, Series]:
        """Return a checkpoint's progress and one row per step, both since the last one; then start afresh.

        Args:
            why: RUNG, INTERVAL or PREEMPTION.
        """
        series, step = self.series, int(self.series[-1]["step"])
        progress = Progress(
            step=step,
            train_loss=sum(row["loss"] for row in series) / len(series),
            grad_norm=sum(row["grad_norm"] for row in series) / len(series),
            images_per_second=self.images_per_second,
            waiting_for_data=self.waited / self.seconds if self.seconds else 0.0,
            state_bytes=self.state_bytes,
            why=why,
            world_size=self.engine.world_size,
        )
        if self.startup:
            progress, self.startup = progress | {"startup_seconds": self.startup.record}, None
        self.saved_step, self.saved_at, self.warming_up = step, time.monotonic(), False
        self._restart()
        return progress, series


def memory_gib(device: torch.device) -> float:
    """Return this process's memory on its device in GiB: peak on a GPU, resident set size on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return float(psutil.Process().memory_info().rss) / 2**30
