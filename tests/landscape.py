"""What stands for training and measuring in tests of the search: formulas with a known best point. Ray's
processes import it, so it is not in the test's own file."""

import errno
import math
import os
import time
from typing import Any

from ray import tune

from ray_jobs.config import LEARNING_RATE
from ray_jobs.run.records import RungRow
from ray_jobs.tuning.trial import reported

BEST_RATE = 3e-4


def climb(space: dict[str, Any], *, make: Any, around: Any) -> None:
    """Reports the rungs of a trial whose FID is lowest at BEST_RATE, and at two thirds of the ladder."""
    trial = make(space)
    for step in trial.ladder:
        if step <= trial.begins_at:
            continue
        away = math.log10(trial.settings[LEARNING_RATE] / BEST_RATE)
        overfitting = step / around.config.search.ladder[-1] - 2 / 3
        level = 100 + 20 * (trial.fold or 0)
        row = trial.labels(around.config) | {
            "step": step,
            "fid": level + 30 * away**2 + 10 * overfitting**2,
            "train_loss": 0.1,
            "images_per_second": 10.0,
            "checkpoint": f"{trial.training}/{step}",
        }
        tune.report(reported(RungRow.model_validate(row)))


def out_of_room(space: dict[str, Any], *, make: Any, around: Any) -> None:
    """The first trial finds the disk full; the others would take long."""
    if make(space).settings[LEARNING_RATE] == 1e-3:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), "/storage/part")
    time.sleep(600)
