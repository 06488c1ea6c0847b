"""Training metrics (loss, gradient norm, speed, waiting for data), and when to stop or to save."""

import math
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from ray_jobs.config import TrainConfig
from ray_jobs.console.board import TrainingProgress
from ray_jobs.console.troubleshooting import Help, help_link
from ray_jobs.run.records import Progress
from ray_jobs.training.engine import Engine
from ray_jobs.training.memory import state_bytes
from ray_jobs.training.startup import StartUp

POST_EVERY = 2.0  # seconds between progress lines, and between checks for a preemption
SMOOTHED = 20  # steps over which the displayed loss is averaged
ENOUGH = 64  # images after which a mean loss is comparable, if that is fewer than SMOOTHED steps
LATE = 4  # steps after which a step's loss and norm are read, so that no step waits for a GPU
EXPLODED = 5.0  # multiple of the lowest smoothed loss at which the loss counts as diverged
SLOW, SLOW_S = 0.2, 60.0  # share of so many seconds or more that is too long to wait for data
RUNG, INTERVAL, PREEMPTION = "rung", "interval", "preemption"  # why a checkpoint is written

Series = list[dict[str, float]]
"""One row per step: step, loss, grad_norm (not of a skipped step), learning_rate, time."""


@dataclass(frozen=True)
class Taken:
    """A step whose loss and gradient norm may still be on their way from the device.

    Attributes:
        time: seconds since 1970.
        told: float32, 4: loss, flags to look and to save, gradient norm; on the CPU once `event` has come.
        event: CUDA event; None on a CPU.
    """

    step: int
    rate: float
    time: float
    told: torch.Tensor
    event: Any

    def read(self) -> tuple[float, bool, bool, float]:
        """Wait for the numbers; return loss, flags to look and to save, and gradient norm."""
        if self.event is not None:
            self.event.synchronize()
        loss, look, due, norm = self.told.tolist()
        return loss, bool(look), bool(due), norm


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
        self.taken: deque[Taken] = deque()
        self.skipped = 0
        self.looked = False  # whether a step that was read since it was last reset had the flag to look

    def start(self, engine: Engine) -> None:
        """Start measuring the steps of an engine, and report what it keeps in memory."""
        self.engine, self.state_bytes = engine, state_bytes(engine)
        if self.rank == 0:
            kept = ", ".join(f"{what} {size / 2**20:.0f} MiB" for what, size in self.state_bytes.items())
            line = f"{self.trial_id}  {engine.world_size} workers; rank 0 keeps: {kept}"
            self._tell("memory", line.replace("_", " "))
        self._restart()

    def _restart(self) -> None:
        self.series: Series = []
        self.counted = 0  # steps since then, their numbers read or not
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

    def told(self, share: torch.Tensor) -> torch.Tensor:
        """Return what the ranks sum at a step: a share of the loss, and flags that rank 0 sets by its clock.

        Returns:
            float32, 3, on the share's device: loss, whether to look, whether to save.
        """
        now = time.monotonic()
        look = self.rank == 0 and now - self.posted_at > POST_EVERY
        due = self.rank == 0 and now - self.saved_at > 60 * self.config.checkpoint_minutes
        told = torch.zeros(3, device=share.device)
        told[0] = share
        if look:
            self.posted_at = now
            told[1].fill_(1)
        if due:
            self.saved_at = now
            told[2].fill_(1)
        return told

    def add(self, step: int, rate: float, sums: torch.Tensor, norm: torch.Tensor) -> str:
        """Record a step; return why a checkpoint is due (INTERVAL, PREEMPTION) or "", the same on all ranks.

        A step's numbers are read `LATE` steps later.

        Args:
            sums: `told`, summed over all ranks.
            norm: float32, of the gradient before clipping.

        Raises:
            Diverged: on all ranks at once.
        """
        now = time.monotonic()
        if self.startup:
            self.startup.done("first_step")
        if self.warming_up and not self.counted:
            self.waited, self.saved_at = 0.0, now
        else:
            self.seconds += now - self.last
        self.last = now
        self.counted += 1
        if self.rank == 0 and self.board is not None:
            self.board.count.remote(self.trial_id)
        self.taken.append(Taken(step, rate, time.time(), *_to_host(torch.cat([sums, norm[None]]))))
        return self._read(self.taken.popleft()) if len(self.taken) > LATE else ""

    def read_all(self) -> None:
        """Read the numbers of all steps so far.

        Raises:
            Diverged: on all ranks at once.
        """
        while self.taken:
            self._read(self.taken.popleft())

    def _read(self, taken: Taken) -> str:
        loss, look, due, norm = taken.read()
        self._watch(taken.step, loss, norm)
        row = {"step": taken.step, "loss": loss, "learning_rate": taken.rate, "time": taken.time}
        self.series.append(row | ({"grad_norm": norm} if math.isfinite(norm) else {}))
        self.looked |= look
        preempted = look and self._preempted()
        if look and self.rank == 0 and self.board is not None and self.seconds:
            self._post()
        return PREEMPTION if preempted else INTERVAL if due else ""

    def _post(self) -> None:
        """Post the progress, and how many steps were skipped if that is new."""
        self.board.show.remote(self.trial_id, self._progress().line())
        if self.engine.skipped > self.skipped:
            self.skipped = self.engine.skipped
            line = f"{self.trial_id}  {self.skipped} steps skipped: their gradients were not finite"
            self._tell(f"skipped {self.skipped}", line)

    def _tell(self, key: str, line: str) -> None:
        """Post a line on the board, if this is rank 0 and there is one."""
        if self.rank == 0 and self.board is not None:
            self.board.post.remote(f"{self.trial_id}/{key}", line)

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
        section = Help.NOT_A_NUMBER
        if not math.isfinite(loss):
            what = "is not a number"
        elif smoothed > EXPLODED * self.lowest:
            what, section = f"rose from {self.lowest:.3g} to {smoothed:.3g}", Help.DIVERGENCE
        elif not math.isfinite(norm) and self.config.precision != "fp16":
            # DeepSpeed skips such steps; with fp16 that is normal until the loss scale fits.
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
            f"train.precision: {self.config.precision}; {help_link(section)}"
        )

    @property
    def seconds_per_step(self) -> float:
        return self.seconds / max(1, self.counted - self.warming_up)

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
            grad_norm=last.get("grad_norm", math.inf),
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

        Raises:
            Diverged: on all ranks at once.
        """
        self.read_all()
        series, step = self.series, int(self.series[-1]["step"])
        norms = [row["grad_norm"] for row in series if "grad_norm" in row]
        progress = Progress(
            step=step,
            train_loss=sum(row["loss"] for row in series) / len(series),
            images_per_second=self.images_per_second,
            waiting_for_data=self.waited / self.seconds if self.seconds else 0.0,
            state_bytes=self.state_bytes,
            why=why,
            world_size=self.engine.world_size,
        )
        if line := slow_data_line(self.trial_id, progress.waiting_for_data, self.seconds):
            self._tell("slow data", line)
        if norms:
            progress |= {"grad_norm": sum(norms) / len(norms)}
        if self.startup:
            progress, self.startup = progress | {"startup_seconds": self.startup.record}, None
        self.saved_step, self.saved_at, self.warming_up = step, time.monotonic(), False
        self._restart()
        return progress, series


def slow_data_line(name: str, share: float, seconds: float) -> str | None:
    """Return the line about a training that waits for data; None if that is short, or hardly measured.

    Args:
        share: of the seconds since the last checkpoint that were spent waiting.
    """
    if seconds < SLOW_S or share < SLOW:
        return None
    return f"{name}: waits for data {share:.0%} of the time; {help_link(Help.SLOW_DATA)}"


def _to_host(numbers: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """Begin to copy numbers to the host; return them, and the CUDA event after which they may be read."""
    if numbers.device.type == "cpu":
        return numbers, None
    there = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
    there.copy_(numbers, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return there, event


def memory_gib(device: torch.device) -> float:
    """Return this process's memory on its device in GiB: peak on a GPU, resident on a CPU.

    Memory that it shares is not counted: the more rows it has read, the more pages of Ray's object store are
    resident.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    resident, status = int(psutil.Process().memory_info().rss), Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []  # of Linux only
    shared = sum(int(line.split()[1]) << 10 for line in lines if line.startswith("RssShmem:"))
    return (resident - shared) / 2**30
