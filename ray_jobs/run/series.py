"""Losses of every step, which a training writes with each of its checkpoints."""

import json
import math
import threading
import time
from itertools import groupby
from statistics import fmean

from cluster.storage import Storage

FOLDER = "step-"  # a checkpoint's, below the training's
SERIES = "series.json"  # one object per step since the checkpoint before
POINTS = 100
"""Maximum number of points of a curve; each is the mean of the steps since the one before."""

LOOK_S = 10.0
"""Interval between listings of an object store, in seconds."""

Losses = dict[str, list[tuple[int, float]]]
"""Step and mean loss of the steps up to it, in the order of steps, by name of the training."""


class LossReader:
    """Reader of the losses of all trainings of a run; safe for threads.

    A file is read once. One that is still being written is read with the next look.

    Args:
        trainings: folder of the run's trainings.
    """

    def __init__(self, trainings: Storage) -> None:
        self.trainings = trainings
        self.files = 0  # number of files that were read: it changes with what `read` returns
        self._lock = threading.Lock()
        self._looked = -math.inf
        self._seen: set[tuple[str, str]] = set()
        self._steps: dict[str, dict[int, float]] = {}
        self._curves: Losses = {}

    def read(self) -> Losses:
        """Return the losses that are written until now, at most `POINTS` of each training."""
        with self._lock:
            if self.trainings.is_local or time.monotonic() - self._looked > LOOK_S:
                before, self._looked = self.files, time.monotonic()
                self._look()
                if self.files > before:
                    self._curves = {name: _reduced(each) for name, each in self._steps.items() if each}
            return self._curves

    def _look(self) -> None:
        for name in self.trainings.folders():
            training = self.trainings.child(name)
            for folder in training.folders():
                if folder.startswith(FOLDER) and (name, folder) not in self._seen:
                    try:
                        rows = json.loads(training.child(folder).read_text(SERIES))
                    except (FileNotFoundError, ValueError):  # it is still being written
                        continue
                    self._seen.add((name, folder))
                    self.files += 1
                    losses = {int(row["step"]): row["loss"] for row in rows if math.isfinite(row["loss"])}
                    self._steps.setdefault(name, {}).update(losses)


def _reduced(losses: dict[int, float]) -> list[tuple[int, float]]:
    """Return means over neighbouring steps, evenly over the logarithm of the step, as charts have it."""
    steps = sorted(losses)
    whole = math.log(steps[-1] / steps[0]) or 1.0

    def part(step: int) -> int:
        return min(POINTS - 1, int(POINTS * math.log(step / steps[0]) / whole))

    means = [list(each) for _, each in groupby(steps, part)]
    return [(each[-1], fmean(losses[step] for step in each)) for each in means]
