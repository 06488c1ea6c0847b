"""Successive halving, with the FIDs that benchmarks/search.py has measured of a grid (seed 1)."""

from itertools import permutations
from pathlib import Path
from typing import Any

import pytest

from ray_jobs.config import Config, ConfigError, load_config
from ray_jobs.run.records import RungRow
from ray_jobs.tuning.scheduling import run_trials
from ray_jobs.tuning.successive_halving import all_trials, best_trials
from ray_jobs.tuning.trial import Trial

ROOT = Path(__file__).parents[2]
FIDS = {
    ("lr-0.002", 80): 138.66,
    ("lr-0.002", 160): 136.73,
    ("lr-0.002", 320): 135.82,
    ("lr-0.001", 80): 142.08,
    ("lr-0.001", 160): 137.45,
    ("lr-0.001", 320): 136.24,
    ("lr-0.0005", 80): 145.59,
    ("lr-0.0005", 160): 140.37,
    ("lr-0.0005", 320): 135.05,
    ("lr-0.0002", 80): 156.01,
    ("lr-0.0002", 160): 143.65,
    ("lr-0.0002", 320): 140.40,
}
RATES = (2e-3, 1e-3, 5e-4, 2e-4)


def configured(*overrides: str) -> Config:
    return load_config(
        ROOT / "configs" / "demo.yaml",
        ["search.scheduler=halving", f"search.learning_rates={list(RATES)}", *overrides],
    )


class Looked:
    """Trials whose FIDs are looked up, in the place of those that train.

    Attributes:
        steps: that were taken, a rung's no second time.
        left: rungs to take until this start of the search dies.
    """

    budget_is_spent = False

    def __init__(self, left: int = 100) -> None:
        self.rows: list[RungRow] = []
        self.settings: dict[str, Any] = {}
        self.steps, self.left = 0, left

    def run_all(self, trials: list[Trial]) -> None:
        for trial in trials:
            self.settings[trial.trial_id] = trial.settings
            before = 0
            for step in trial.ladder:
                if not any((row.training_name, row.step) == (trial.training, step) for row in self.rows):
                    if not self.left:
                        raise KeyboardInterrupt
                    self.left -= 1
                    self.steps += step - before
                    self.rows.append(
                        RungRow(
                            trial_id=trial.trial_id,
                            fold=trial.fold,
                            training=trial.training,
                            step=step,
                            fid=FIDS[trial.trial_id, step],
                        )
                    )
                before = step


def searched(config: Config, done: Looked) -> set[tuple[str, int]]:
    told: Any = done
    run_trials(config, told)
    return {(row.training_name, row.step) for row in done.rows}


def test_the_steps_and_what_is_measured_do_not_depend_on_the_order_of_the_rates() -> None:
    expected = {(f"lr-{rate:g}", 80) for rate in RATES}
    expected |= {("lr-0.002", 160), ("lr-0.001", 160), ("lr-0.002", 320)}
    for rates in permutations(RATES):
        config, done = configured(f"search.learning_rates={list(rates)}"), Looked()
        assert searched(config, done) == expected
        assert done.steps == config.search.planned_steps == 4 * 80 + 2 * 80 + 1 * 160


@pytest.mark.parametrize("rungs", range(7))
def test_an_interrupted_search_goes_on_with_the_same_trials_and_repeats_no_rung(rungs: int) -> None:
    done = Looked(left=rungs)
    with pytest.raises(KeyboardInterrupt):
        searched(configured(), done)
    done.left = 100
    whole = Looked()
    assert searched(configured(), done) == searched(configured(), whole) and done.steps == whole.steps


def test_a_spent_budget_begins_no_further_rung() -> None:
    done = Looked()
    done.budget_is_spent = True
    assert searched(configured(), done) == set()


def test_the_first_fold_decides_what_the_others_train() -> None:
    config, done = configured("data.folds=2", "search.folds=2"), Looked()
    measured = searched(config, done)
    first = {(name.removesuffix("_fold-0"), step) for name, step in measured if name.endswith("_fold-0")}
    assert first == {(name.removesuffix("_fold-1"), step) for name, step in measured if "_fold-1" in name}
    assert done.steps == config.search.planned_steps == 2 * 640


def test_one_goes_on_where_the_share_is_less_and_a_trial_that_failed_is_left_out() -> None:
    config = configured("search.reduction_factor=3")
    trials = all_trials(config, None)
    fids = {"lr-0.002": 9.0, "lr-0.001": 9.0, "lr-0.0005": 12.0}
    rows = [RungRow(trial_id=name, step=80, fid=fid) for name, fid in fids.items()]
    [best] = best_trials(config, trials, rows)
    assert (best.training, best.ladder) == ("lr-0.001", [80, 160]), "of the same FID the name decides"
    assert best_trials(config, list(reversed(trials)), rows) == [best]
    assert best_trials(config, trials, []) == []


def test_halving_refuses_trials_that_are_proposed_one_after_the_other() -> None:
    with pytest.raises(ConfigError, match="halving compares all trials at a rung"):
        configured("search.algorithm=optuna", "search.num_trials=3")
