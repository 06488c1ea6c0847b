"""When a search stops trials on its own, beside what ASHA stops: no improvement, the budget is spent, or a
store refuses what they write."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from ray.tune import Stopper

from ray_jobs.config import Config, ConfigError
from ray_jobs.run.names import training_of

Computed = Callable[[], Mapping[str, int]]
"""The steps that were computed up to now, by training."""


def stoppers(config: Config, recorded: list[dict[str, Any]], computed: Computed) -> list[Stopper]:
    """Those that the configuration asks for.

    Args:
        recorded: lines of results.jsonl that an earlier start of this search has left; they were paid for.
    """
    patience = config.search.patience
    return [Budget(config, recorded, computed), *([Patience(patience)] if patience else [])]


class Patience(Stopper):
    """Stops a trial that has not improved at so many rungs in a row.

    An FID is an improvement if it is lower than the best by more than its own standard error.
    """

    def __init__(self, rungs: int) -> None:
        self.rungs = rungs
        self.best: dict[str, float] = {}
        self.waited: dict[str, int] = {}

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        if "fid" not in result:
            return False
        best = self.best.get(trial_id, math.inf)
        improved = result["fid"] < best - (result.get("fid_error") or 0.0)
        self.waited[trial_id] = 0 if improved else self.waited.get(trial_id, 0) + 1
        self.best[trial_id] = min(result["fid"], best)
        return self.waited[trial_id] >= self.rungs

    def stop_all(self) -> bool:
        return False


class Refusal(Stopper):
    """Stops the search once a trial has failed for what the user must mend: it would fail the others too."""

    def __init__(self) -> None:
        self.error: ConfigError | None = None

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self.error is not None


class Budget(Stopper):
    """Stops the search once all trials together have spent `search.max_steps`, `max_hours` or `max_cost`.

    It looks at each rung, so the last rungs may go beyond it. Steps are those that were computed, also such
    as no rung has; hours are those of workers: two workers spend two in an hour.
    """

    def __init__(self, config: Config, recorded: list[dict[str, Any]], computed: Computed) -> None:
        self.search, self.workers, self.computed = config.search, config.train.min_workers, computed
        self.steps = dict(computed())
        self.seconds: dict[tuple[str, str], float] = {}
        for row in recorded:
            self._add(row, "before", row["seconds"])

    def _add(self, row: dict[str, Any], start: str, seconds: float) -> None:
        name, steps = training_of(row), row["step"] - row.get("begins_at", 0)
        self.steps[name] = max(self.steps.get(name, 0), steps)
        self.seconds[name, start] = max(self.seconds.get((name, start), 0.0), seconds)

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        if "fid" in result:
            for name, steps in self.computed().items():
                self.steps[name] = max(self.steps.get(name, 0), steps)
            self._add(result, "now", result["time_total_s"])
        return False

    def stop_all(self) -> bool:
        if not self.seconds:
            return False  # nothing is measured yet, so there is nothing to choose from
        hours = sum(self.seconds.values()) / 3600 * self.workers
        spent = {
            "max_steps": sum(self.steps.values()),
            "max_hours": hours,
            "max_cost": hours * (self.search.device_hour_price or 0.0),
        }
        limits = {name: getattr(self.search, name) for name in spent}
        return any(limit is not None and spent[name] >= limit for name, limit in limits.items())
