"""Stoppers of a search beside its scheduler: no improvement, spent budget, or a store that refuses writes."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from ray.tune import Stopper

from cluster.promise import Promise
from ray_jobs.config import Config, ConfigError
from ray_jobs.run.records import RungRow

Result = Mapping[str, Any]
"""A row as a trial reports it, with the columns that Tune adds."""
WORKER_SECONDS = "worker_seconds"  # in a result: of a trial that shares its workers with others, its share
Computed = Callable[[], Mapping[str, int]]
"""Function that returns the steps computed so far, by training."""


def spent(result: Result) -> float:
    """Return the seconds that a trial's workers have spent on it since this start of the search."""
    seconds: float = result.get(WORKER_SECONDS, result["time_total_s"])
    return seconds


def stoppers(config: Config, recorded: list[RungRow], computed: Computed) -> list[Stopper]:
    """Build the stoppers that the configuration asks for.

    Args:
        recorded: lines of results.jsonl from earlier starts of this search; their cost counts too.
    """
    patience = config.search.patience
    return [Budget(config, recorded, computed), *([Patience(patience)] if patience else [])]


class Patience(Stopper):
    """Stop a trial that has not improved at `rungs` consecutive rungs.

    A score is an improvement if it is lower than the best by more than its own standard error.
    """

    def __init__(self, rungs: int) -> None:
        self.rungs = rungs
        self.best: dict[str, float] = {}
        self.waited: dict[str, int] = {}
        self.at: dict[str, int] = {}  # the last rung; a trial that starts again reports its rungs again

    def __call__(self, trial_id: str, result: Result) -> bool:
        if "score" not in result or result["step"] <= self.at.get(trial_id, -1):
            return False
        self.at[trial_id] = result["step"]
        best = self.best.get(trial_id, math.inf)
        improved = result["score"] < best - (result.get("score_error") or 0.0)
        self.waited[trial_id] = 0 if improved else self.waited.get(trial_id, 0) + 1
        self.best[trial_id] = min(result["score"], best)
        return self.waited[trial_id] >= self.rungs

    def stop_all(self) -> bool:
        return False


class Refusal(Stopper):
    """Stop the search once all its trials would fail.

    A trial has failed for a cause that the user must fix, or what would measure the rungs has failed.

    Args:
        measuring: promise of what measures the rungs.
    """

    def __init__(self, measuring: Promise[Any]) -> None:
        self.measuring = measuring
        self.error: ConfigError | None = None

    def __call__(self, trial_id: str, result: Result) -> bool:
        return False

    def stop_all(self) -> bool:
        return self.error is not None or self.measuring.has_failed


class Budget(Stopper):
    """Stop the search once all trials together have spent `search.max_steps`, `max_hours` or `max_cost`.

    The budget is checked at each rung, so the last rungs may exceed it. Steps are all computed steps,
    including those after the last rung. Hours are worker hours: two workers spend two per hour.
    """

    def __init__(self, config: Config, recorded: list[RungRow], computed: Computed) -> None:
        self.search, self.workers, self.computed = config.search, config.train.min_workers, computed
        self.steps = dict(computed())
        self.seconds: dict[tuple[str, str], float] = {}
        for row in recorded:
            self._add(row, "before", row.seconds)

    def _add(self, row: RungRow, start: str, seconds: float) -> None:
        name, steps = row.training_name, row.step - row.begins_at
        self.steps[name] = max(self.steps.get(name, 0), steps)
        self.seconds[name, start] = max(self.seconds.get((name, start), 0.0), seconds)

    def __call__(self, trial_id: str, result: Result) -> bool:
        if "score" in result:
            for name, steps in self.computed().items():
                self.steps[name] = max(self.steps.get(name, 0), steps)
            self._add(RungRow.model_validate(result), "now", spent(result))
        return False

    def stop_all(self) -> bool:
        if not self.seconds:
            return False  # no rung is measured yet, so there is no candidate to choose
        hours = sum(self.seconds.values()) / 3600 * self.workers
        spent = {
            "max_steps": sum(self.steps.values()),
            "max_hours": hours,
            "max_cost": hours * (self.search.device_hour_price or 0.0),
        }
        limits = {name: getattr(self.search, name) for name in spent}
        return any(limit is not None and spent[name] >= limit for name, limit in limits.items())
