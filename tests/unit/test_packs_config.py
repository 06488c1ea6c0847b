"""Which searches can train their trials together, and what is said of those that cannot."""

from pathlib import Path

import pytest

from cluster.capacity import search_actors
from ray_jobs.config import Config, ConfigError, load_config

DEMO = Path(__file__).parents[2] / "configs" / "demo.yaml"

REFUSED = {
    "search.max_concurrent_trials=2": "search.max_concurrent_trials: 2 asks for workers of each trial's own",
    "train.method=full": "train.method: full trains whole layers",
    "search.space={train.batch_size: [4, 8]}": "trials differ in train.batch_size, which is not of their",
    "train.zero_stage=3": "train.engine: DeepSpeed takes the steps",
    "train.compile=true": "train.compile would compile each number of trials anew",
    "search.scheduler=population": "search.scheduler: population continues trials from each other",
    "search.learning_rates=[1.0e-3]": "the search has one trial",
    "search.space={train.lora.dropout: [0.0, 0.1], train.lora.target_modules: [[to_q], [to_k]]}": (
        "trials whose adapters are in different layers draw other numbers for train.lora.dropout"
    ),
    "search.space={train.lora: [{dropout: 0.1, target_modules: [to_q]}, {target_modules: [to_k]}]}": (
        "trials whose adapters are in different layers draw other numbers for train.lora.dropout"
    ),
}


def config(*overrides: str) -> Config:
    return load_config(DEMO, ["search.learning_rates=[1.0e-3,2.0e-3]", *overrides])


@pytest.mark.parametrize(("override", "reason"), REFUSED.items())
def test_what_cannot_be_trained_together_is_refused_by_number_and_not_by_auto(
    override: str, reason: str
) -> None:
    with pytest.raises(ConfigError, match=r"search\.pack: 2 trials cannot be trained together: ") as error:
        config("search.pack=2", override)
    assert reason in str(error.value) and "search.pack: auto" in str(error.value)
    found = config("search.pack=auto", override)
    assert found.trials_together == 1 and found.why_not_together.startswith(reason)


def test_a_pack_has_at_most_as_many_trials_as_the_search() -> None:
    assert config("search.pack=auto").trials_together == 2
    assert config("search.pack=3").trials_together == 2
    assert config("search.pack=off").trials_together == 1
    assert (
        config("search.pack=auto", "search.space={train.lora.rank: [2, 4, 8, 16, 32]}").trials_together == 8
    )


def test_folds_of_a_trial_train_together_where_pictures_have_one_shape() -> None:
    folds = ["search.pack=auto", "search.folds=3", "data.folds=3"]
    assert config(*folds).trials_together == 6
    assert config(*folds, "data.buckets=true").trials_together == 2
    one = config(*folds, "search.learning_rates=[1.0e-3]")
    assert (one.trials_together, one.not_together) == (3, "")


def test_optuna_learns_from_some_trials_before_it_proposes_others() -> None:
    rates = "search.learning_rates={low: 1.0e-4, high: 1.0e-2}"
    optuna = [rates, "search.scheduler=asha", "search.algorithm=optuna", "search.num_trials=12"]
    assert config("search.pack=auto", *optuna).trials_together == 4
    assert config("search.pack=6", *optuna).trials_together == 6


def test_a_pack_has_one_worker_group_and_drivers_that_only_wait() -> None:
    counts = {
        actors.kind: (actors.count, actors.cpus) for actors in search_actors(config("search.pack=auto"))
    }
    assert [counts[kind] for kind in ("training worker", "trial driver")] == [(2, 1), (2, 0.01)]


@pytest.mark.parametrize("given", ["1", "sometimes"])
def test_a_pack_is_a_number_of_at_least_two_or_a_word(given: str) -> None:
    with pytest.raises(ConfigError, match=r"search\.pack: "):
        config(f"search.pack={given}")
