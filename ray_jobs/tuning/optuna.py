"""Optuna's tree of Parzen estimators (Watanabe, arXiv 2304.11127) as Tune's search algorithm.

Unlike Ray's own OptunaSearch it never proposes the same settings twice: two such trials would run the same
training in the same folder.
"""

import math
from collections.abc import Callable
from typing import Any

import optuna
from ray.tune.search import Searcher

from ray_jobs.config import Config, Range, Settings
from ray_jobs.config.space import MOST_DRAWS, IntegerRange, Values, nearest
from ray_jobs.run.names import trial_id
from ray_jobs.tuning.stopping import Result

RANDOM_TRIALS = 5  # random draws before the estimators have data


class Proposals(Searcher):
    """Search algorithm that proposes settings likely to lower the score.

    Args:
        before: settings of the trials that an earlier start of this search began. They are proposed first;
            their measured rungs cost nothing again.
        at_end: called with the number of trials if these are all that the space has.
    """

    def __init__(
        self, config: Config, before: list[Settings], at_end: Callable[[int], object] = lambda _: None
    ) -> None:
        super().__init__(metric="score", mode="min")
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.dimensions = config.search.dimensions
        self.distributions = {name: _distribution(values) for name, values in self.dimensions.items()}
        sampler = optuna.samplers.TPESampler(
            seed=config.seed, n_startup_trials=RANDOM_TRIALS, constant_liar=True
        )
        self.study = optuna.create_study(sampler=sampler)
        for settings in before:
            self.study.enqueue_trial({name: self._place(name, value) for name, value in settings.items()})
        self.asked: dict[str, optuna.Trial] = {}
        self.lowest: dict[str, float] = {}  # score of a trial's rungs, by its name in Tune
        self.proposed: set[str] = set()
        self.at_end = at_end

    def suggest(self, trial_id_of_tune: str) -> Settings | str:
        """Propose the next trial's settings, or return FINISHED if no new ones are found."""
        for _ in range(MOST_DRAWS):
            trial = self.study.ask(self.distributions)
            settings = {name: self._value(name, place) for name, place in trial.params.items()}
            if trial_id(settings) not in self.proposed:
                self.proposed.add(trial_id(settings))
                self.asked[trial_id_of_tune] = trial
                return settings
            self.study.tell(trial, state=optuna.trial.TrialState.FAIL)  # ignored by the sampler
        self.at_end(len(self.proposed))
        return str(Searcher.FINISHED)

    def on_trial_result(self, trial_id_of_tune: str, result: Result) -> None:
        """Record a rung's score if it is the trial's lowest."""
        if "score" in result:
            lowest = self.lowest.get(trial_id_of_tune, math.inf)
            self.lowest[trial_id_of_tune] = min(lowest, result["score"])

    def on_trial_complete(
        self, trial_id_of_tune: str, result: Result | None = None, error: bool = False
    ) -> None:
        """Report a trial's best rung to the study: every rung is a candidate, and the last may overfit."""
        self.on_trial_result(trial_id_of_tune, result or {})
        trial, lowest = self.asked.pop(trial_id_of_tune), self.lowest.pop(trial_id_of_tune, math.inf)
        if lowest < math.inf:
            self.study.tell(trial, lowest)
        else:
            self.study.tell(trial, state=optuna.trial.TrialState.FAIL)

    def save(self, checkpoint_path: str) -> None:
        """Do nothing: a search resumes from its own files, not from Tune's."""

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError("a search goes on from its own files, not from Tune's")

    def _value(self, name: str, place: Any) -> Any:
        values = self.dimensions[name]
        return nearest(values, place) if isinstance(values, Range) else values[place]

    def _place(self, name: str, value: Any) -> Any:
        values = self.dimensions[name]
        return value if isinstance(values, Range) else values.index(value)


def _distribution(values: Values) -> optuna.distributions.BaseDistribution:
    """Optuna's distribution of a dimension; a list is represented by its indices.

    Optuna's own categorical choices may not be lists.
    """
    if isinstance(values, IntegerRange):
        return optuna.distributions.IntDistribution(values.low, values.high, log=values.log)
    if isinstance(values, Range):
        return optuna.distributions.FloatDistribution(values.low, values.high, log=values.log)
    return optuna.distributions.CategoricalDistribution(range(len(values)))
