"""Successive halving (Jamieson & Talwalkar, arXiv 1502.07943): trials pause at a rung until all are measured.

The best 1 / `search.reduction_factor` of the trials measured at a rung, at least one, continue to the next.
No trial trains past a rung before the decision, so no step is wasted, and unlike with ASHA the outcome does
not depend on the order of the trials. Decisions follow from the measured rungs, so an interrupted search
resumes with the same trials.
"""

from dataclasses import replace

from ray_jobs.config import Config
from ray_jobs.run.records import RungRow
from ray_jobs.tuning.space import points
from ray_jobs.tuning.trial import Trial


def all_trials(config: Config, fold: int | None) -> list[Trial]:
    """Return every trial of the space, up to the first rung."""
    return [Trial.of(settings, config.search.ladder[:1], fold) for settings in points(config)]


def best_trials(config: Config, trials: list[Trial], rows: list[RungRow]) -> list[Trial]:
    """Return the trials that continue, up to the next rung.

    At a rung all trials have trained the same steps, so the tie rule, which prefers fewer steps, does not
    apply: the lowest scores continue. Equal ones are ordered by name, independently of the trials' order.

    Args:
        trials: trials of this rung; one without a row (it failed) is dropped.
        rows: rows of all rungs.
    """
    reached = trials[0].ladder
    at = {row.training_name: row.score for row in rows if row.step == reached[-1]}
    measured = [trial for trial in trials if trial.training in at]
    measured.sort(key=lambda trial: (at[trial.training], trial.training))
    upwards = config.search.ladder[: len(reached) + 1]
    return [replace(trial, ladder=upwards) for trial in measured[: config.search.num_promoted(len(measured))]]
