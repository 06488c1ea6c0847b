"""Run the trials of a search as its scheduler orders them, and choose the winner."""

from collections.abc import Callable
from functools import partial

from ray_jobs.config import Config
from ray_jobs.console import say
from ray_jobs.evaluation.cross_validation import choose_over_folds, standing
from ray_jobs.run.records import RungRow
from ray_jobs.tuning.driver import Trials
from ray_jobs.tuning.guidance import choose_guidance
from ray_jobs.tuning.population_based import first_generation, next_generation
from ray_jobs.tuning.results import candidates, choose
from ray_jobs.tuning.space import points
from ray_jobs.tuning.successive_halving import all_trials, best_trials
from ray_jobs.tuning.trial import Trial, refitted


def run_trials(config: Config, done: "Trials") -> None:
    """Run every training that precedes the choice of the winner."""
    search, ladder = config.search, config.search.ladder
    at_once = config.trials_together > 1 and config.folds_together > 1
    if at_once and search.grid_size == 1:  # there is no other trial that could stop it
        [settings] = points(config)
        done.run_all([Trial.of(settings, ladder, fold) for fold in range(search.folds)])
        return
    first = 0 if search.folds else None
    if search.scheduler == "population":
        run_generations(config, done, first_generation(config), next_generation)
    elif search.scheduler == "halving":
        run_generations(config, done, all_trials(config, first), best_trials)
    else:
        done.run_space(partial(Trial.of, ladder=ladder, fold=first))
    others = range(1, search.folds)
    for folds in [others] if at_once and others else [range(fold, fold + 1) for fold in others]:
        left = standing(done.rows, folds[0])
        upwards = {name: [step for step in ladder if step <= last] for name, last in left.items()}
        done.run_all(
            [Trial.of(done.settings[name], rungs, fold) for name, rungs in upwards.items() for fold in folds]
        )


Following = Callable[[Config, list[Trial], list[RungRow]], list[Trial]]
"""Function that selects the trials to continue to the next rung from those measured at the last."""


def run_generations(config: Config, done: "Trials", trials: list[Trial], following: Following) -> None:
    """Run one generation per rung; all of it is measured before the next one starts."""
    while trials and not done.budget_is_spent:
        done.run_all(trials)
        if trials[0].ladder == config.search.ladder or done.budget_is_spent:
            return
        before, trials = trials, following(config, trials, done.rows)
        if len(trials) < len(before):
            names = ", ".join(trial.training for trial in trials)
            say("search", f"rung {before[0].ladder[-1]}: of {len(before)} trials go on: {names or 'none'}")


def choose_winner(config: Config, done: "Trials") -> RungRow:
    """Return the winning candidate's row; the rows of `done` get what they were compared by."""
    if not config.search.folds:
        pool = done.around.pool.wait()
        best, done.rows[:] = choose(done.rows, pool)
        return choose_guidance(config, done.rows, best, pool)
    rows = candidates(config, done.rows)
    if not rows:
        raise RuntimeError("search.folds: no rung was measured in all folds; see search/results.jsonl")
    best = choose_over_folds(rows)
    say("search", f"{best.trial_id} at step {best.step}: training it on all folds together")
    trial = Trial.of(done.settings[best.trial_id], config.search.ladder)
    return best | {"checkpoint": refitted(trial, best.step, done.around).uri}
