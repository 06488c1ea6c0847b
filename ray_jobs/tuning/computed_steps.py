"""Count the denoiser steps that the trainings of a search compute.

The count exceeds the steps of the measured rungs: a trial keeps training while the rung that stops it is
measured, and a training that died repeats the steps after its last checkpoint.
`<storage>/<run>/search/computed.json` holds steps by training, summed over all starts of the search.
"""

import json
import time
from typing import TYPE_CHECKING

from cluster.storage import Storage
from ray_jobs.console import say

if TYPE_CHECKING:
    from ray.actor import ActorHandle

COMPUTED = "computed.json"
WRITE_EVERY = 10.0  # seconds; a driver that dies loses at most the counts of this interval


def read_computed(storage: Storage) -> dict[str, int]:
    """Read the steps by training; empty if the file does not exist."""
    return json.loads(storage.read_text(COMPUTED)) if storage.exists(COMPUTED) else {}


class ComputedSteps:
    """Count of computed steps, kept in a file from which a later start resumes.

    Args:
        storage: the search's folder.
        board: handle of the ProgressBoard on which trainings count their steps; None if nothing is trained.
    """

    def __init__(self, storage: Storage, board: "ActorHandle | None") -> None:
        self.storage, self.board = storage, board
        self.steps = read_computed(storage)
        self.taken_at = time.monotonic()
        self.unwritten = False

    def take(self) -> dict[str, int]:
        """Collect new steps from the board and return all steps by training, over all starts of the search.

        New counts are written to the file. If that fails, a line says so and the next call tries again.
        """
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
        """Call `take` if more than `WRITE_EVERY` seconds have passed since the last call."""
        if time.monotonic() - self.taken_at > WRITE_EVERY:
            self.take()
