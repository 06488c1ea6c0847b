"""Successive halving (Jamieson & Talwalkar, arXiv 1502.07943): trials pause at a rung until all are measured.

The best 1 / `search.reduction_factor` of those that a rung has measured go on to the next one, at least one.
Nobody trains past a rung before it is decided, so no step is thrown away, and what is trained does not depend
on the order of the trials, as it does with ASHA. What was decided follows from the measured rungs, so an
interrupted search goes on with the same trials.
"""

from dataclasses import replace
from typing import Any

from ray_jobs.config import Config
from ray_jobs.run.names import training_of
from ray_jobs.tuning.space import points
from ray_jobs.tuning.trial import Trial


def all_trials(config: Config, fold: int | None) -> list[Trial]:
    """Every trial of the space, up to the first rung."""
    return [Trial.of(settings, config.search.ladder[:1], fold) for settings in points(config)]


def best_trials(config: Config, trials: list[Trial], rows: list[dict[str, Any]]) -> list[Trial]:
    """Those that go on, up to the next rung.

    At a rung all have trained the same steps, so the tie rule, which goes by steps, tells none apart: the
    lower FID goes on, and of the very same FID the name decides, which does not depend on the order.

    Args:
        trials: that were measured; one that left no row (it failed) is left out.
        rows: of all rungs.
    """
    reached = trials[0].ladder
    at = {training_of(row): row["fid"] for row in rows if row["step"] == reached[-1]}
    measured = [trial for trial in trials if trial.training in at]
    measured.sort(key=lambda trial: (at[trial.training], trial.training))
    upwards = config.search.ladder[: len(reached) + 1]
    return [replace(trial, ladder=upwards) for trial in measured[: config.search.going_on(len(measured))]]
