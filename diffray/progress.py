"""What the rungs of a run say until now: the best one, hours and cost."""

from collections.abc import Sequence

from ray_jobs.config import Config
from ray_jobs.evaluation.cross_validation import averaged
from ray_jobs.report.charts import finite
from ray_jobs.run.records import RungRow, Winner, worker_hours


def best_rung(config: Config, rows: Sequence[RungRow], winner: Winner | None) -> RungRow:
    """Return the winner's rung or, before there is one, the rung with the lowest score.

    Args:
        rows: at least one.
    """
    folds = config.search.folds
    candidates = (averaged(list(rows), folds) if folds else None) or rows
    place = winner and (winner.trial_id, winner.step)
    return min(candidates, key=lambda row: (row.place != place, finite(row, "score") is None, row.score))


def spent(config: Config, rows: Sequence[RungRow]) -> tuple[float, float | None]:
    """Return the hours of workers up to the last rung of each training, and their price.

    The price is None without `search.device_hour_price`.
    """
    hours = sum(worker_hours(rows, config.train.min_workers).values())
    price = config.search.device_hour_price
    return hours, hours * price if price else None
