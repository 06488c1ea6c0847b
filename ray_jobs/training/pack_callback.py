"""Tells the trials of a pack of their rungs; runs in Ray Train's controller."""

from typing import Any

from ray.train import UserCallback

from ray_jobs.training.monitor import RUNG


class PackCallback(UserCallback):
    """Ray Train callback that records in a PackQueue each rung that is in storage.

    Args:
        queue: handle of the PackQueue.
    """

    def __init__(self, queue: Any) -> None:
        self.queue = queue

    def after_report(self, run_context: object, metrics: list[dict[str, Any]], checkpoint: object) -> None:
        if metrics[0]["why"] == RUNG:
            self.queue.rung_saved.remote(metrics[0]["training"], metrics[0]["step"])
