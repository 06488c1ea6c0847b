"""Counts the denoiser steps that the trainings of a search compute.

They are more than what the measured rungs tell: a trial trains on while the rung that stops it is measured,
and a training that died repeats what came after its last checkpoint. Below `<storage>/<run>/search/`:
`computed.json`, steps by training, of all starts of the search.
"""

import json
import time
from typing import Any

from cluster.storage import Storage
from ray_jobs.console import say

COMPUTED = "computed.json"
WRITE_EVERY = 10.0  # seconds: a driver that dies takes the count of so many with it


def read_computed(storage: Storage) -> dict[str, int]:
    """Steps by training; none if there is no such file."""
    return json.loads(storage.read_text(COMPUTED)) if storage.exists(COMPUTED) else {}


class ComputedSteps:
    """The steps that were computed up to now, and the file that a later start goes on from.

    Args:
        storage: of the search.
        board: handle of the ProgressBoard that trainings count their steps on; None: nothing is trained.
    """

    def __init__(self, storage: Storage, board: Any) -> None:
        self.storage, self.board = storage, board
        self.steps = read_computed(storage)
        self.taken_at = time.monotonic()
        self.unwritten = False

    def take(self) -> dict[str, int]:
        """Steps by training, of all starts of the search; writes them down if there are new ones, or says
        that they cannot be, and tries again the next time."""
        import ray

        self.taken_at = time.monotonic()
        new: dict[str, int] = ray.get(self.board.take_steps.remote()) if self.board is not None else {}
        for training, count in new.items():
            self.steps[training] = self.steps.get(training, 0) + count
        self.unwritten |= bool(new)
        if self.unwritten:
            try:
                self.storage.write_text(COMPUTED, json.dumps(self.steps))
                self.unwritten = False
            except OSError as error:  # a count is no reason to end a search
                say("search", f"{COMPUTED} is not written yet: {error}")
        return self.steps

    def take_if_due(self) -> None:
        """Take them if that was last done `WRITE_EVERY` seconds ago."""
        if time.monotonic() - self.taken_at > WRITE_EVERY:
            self.take()
