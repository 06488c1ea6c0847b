"""Report workers that die or fail; runs in Ray Train's controller."""

import re
from collections.abc import Callable
from typing import Any

from ray.train import UserCallback

from cluster.storage import Storage
from ray_jobs.data.encoding.cache_files import DamagedPart
from ray_jobs.run.command_line import damage_message
from ray_jobs.training.checkpoint import folder_of, read_progress, steps_of

LONGEST = 500  # characters of a reason


class FailureReporter(UserCallback):
    """Ray Train callback that reports who failed, why and where, and the step from which training resumes.

    Args:
        trials: returns the folders of the checkpoints of what is trained.
        max_failures: number of restarts left; a preempted node costs none.
        board: handle of a ProgressBoard, or None.
    """

    def __init__(self, name: str, trials: Callable[[], list[Storage]], max_failures: int, board: Any) -> None:
        self.name, self.trials, self.left, self.board = name, trials, max_failures, board

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Raise DamagedPart, which ends the training, if every restart would hit the same damaged data."""
        for error in worker_exceptions.values():
            if damage := damage_message(error):
                raise DamagedPart(damage)
        causes = {rank: cause(error) for rank, error in sorted(worker_exceptions.items())}
        if not any(preempted for _, preempted in causes.values()):
            self.left -= 1
        goes_on = self._last_step() if self.left >= 0 else "given up: train.max_failures is spent"
        told = "; ".join(f"worker {rank} {why}" for rank, (why, _) in causes.items())
        line = f"{self.name}: {told}; {goes_on}"
        print(line)  # in the controller's log
        if self.board is not None:
            self.board.post.remote(f"{self.name}/{line}", line)

    def _last_step(self) -> str:
        try:
            steps = [_last_step(trial) for trial in self.trials()]
            if not steps:
                return "going on: nothing was in training"
            if any(steps):  # a damaged checkpoint is skipped
                return f"going on from step {', '.join(map(str, sorted(set(steps))))} at the latest"
        except Exception as error:  # a storage error here must not end the training
            return f"going on; its checkpoints cannot be read just now: {error}"
        return "starting again: there is no whole checkpoint yet"


def _last_step(trial: Storage) -> int:
    """Return the step of a training's last whole checkpoint; 0 if it has none."""
    whole = (step for step in reversed(steps_of(trial)) if read_progress(trial.child(folder_of(step))))
    return next(whole, 0)


def cause(error: Exception) -> tuple[str, bool]:
    """Return one line saying what happened to a worker, and whether its node was preempted."""
    from ray.exceptions import RayActorError

    death = getattr(error, "health_check_failure", error)
    if not isinstance(death, RayActorError):
        return f"failed: {' '.join(str(error).strip().splitlines()[-1:])[:LONGEST]}", False
    told = " ".join(str(death).split())
    what = "node" if re.search(r"node (has died|was terminated)", told) else "process"
    where = dict(re.findall(r"(pid|ip): (\S+)", told))
    place = f" (process {where['pid']} on {where['ip']})" if {"pid", "ip"} <= where.keys() else ""
    return f"died: its {what} is gone{place}", death.preempted
