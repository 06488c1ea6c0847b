"""The space of a search: settings, names, folds and populations."""

import math
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from ray.tune.search import Searcher

from cluster.storage import Storage
from ray_jobs.config import Config, ConfigError, Range, load_config
from ray_jobs.config.space import IntegerRange, sample
from ray_jobs.config.yaml_text import read_yaml
from ray_jobs.data.feeding.dataset import Dataset
from ray_jobs.evaluation.cross_validation import averaged, choose_over_folds, standing
from ray_jobs.metrics.resampling import PairedDifference
from ray_jobs.run.manifest import Manifest
from ray_jobs.run.names import trial_id
from ray_jobs.run.records import RungRow
from ray_jobs.tuning.optuna import Proposals
from ray_jobs.tuning.population_based import first_generation, next_generation, perturbed
from ray_jobs.tuning.results import SearchResult, at_most, bill, choose, search_digest, spent
from ray_jobs.tuning.space import points
from ray_jobs.tuning.trial import Trial

DEMO = Path(__file__).parents[2] / "configs" / "demo.yaml"
RATE, RANK, DECAY = "train.learning_rate", "train.lora.rank", "train.weight_decay"
RANKS = "space={train.lora.rank: {low: 4, high: 7}}"
DRAWN = ("algorithm=random", "num_trials=3", "learning_rates={low: 1e-5, high: 1e-2}")


def configured(*overrides: str) -> Config:
    return load_config(DEMO, [f"search.{override}" for override in ("scheduler=asha", *overrides)])


def test_a_trial_is_named_by_what_is_searched() -> None:
    assert trial_id({RATE: 1e-3}) == "lr-0.001"
    assert trial_id({RATE: 2e-4, RANK: 8, "train.schedule": "cosine"}) == "lr-0.0002_rank-8_schedule-cosine"
    # Settings of the same last name are told apart by their sections.
    both = trial_id({"train.lora.dropout": 0.1, "train.other.dropout": 0.2})
    assert both == "lora.dropout-0.1_other.dropout-0.2"


def test_a_random_search_draws_different_settings_and_the_same_again() -> None:
    space = "space={train.lora.rank: [4, 8]}"
    ranges = configured(
        "algorithm=random", "num_trials=20", "learning_rates={low: 1.0e-5, high: 1.0e-2}", space
    )
    drawn = points(ranges)
    assert len({trial_id(settings) for settings in drawn}) == 20 and points(ranges) == drawn
    assert all(float(f"{settings[RATE]:.3g}") == settings[RATE] for settings in drawn), "as their names show"
    lists = configured("algorithm=random", "num_trials=3", "learning_rates=[1.0e-3,2.0e-4]", space)
    assert len({trial_id(settings) for settings in points(lists)}) == 3
    # Other trials where more are asked for: the first ones stay.
    assert (
        points(ranges.model_copy(update={"search": ranges.search.model_copy(update={"num_trials": 5})}))
        == drawn[:5]
    )


def test_optuna_proposes_no_settings_twice_and_says_when_there_are_no_more() -> None:
    config = configured("algorithm=optuna", "num_trials=4", "space={train.lora.rank: [4, 8]}")
    proposals = Proposals(config, [{RATE: 2e-4, RANK: 8}])
    found: list[Any] = []
    for number in range(4):
        found.append(proposals.suggest(f"tune-{number}"))
        proposals.on_trial_complete(f"tune-{number}", {"score": float(number)})
    assert found[0] == {RATE: 2e-4, RANK: 8}
    assert len({trial_id(settings) for settings in found}) == 4
    assert proposals.suggest("tune-4") == Searcher.FINISHED


def test_optuna_learns_where_the_fid_is_low() -> None:
    config = configured("algorithm=optuna", "num_trials=30", "learning_rates={low: 1.0e-6, high: 1.0e-1}")
    proposals, away = Proposals(config, []), []
    for number in range(30):
        settings: Any = proposals.suggest(f"tune-{number}")
        away.append(abs(math.log10(settings[RATE] / 3e-4)))
        proposals.on_trial_complete(f"tune-{number}", {"score": 100 + 30 * away[-1] ** 2})
    # Of five decades; what is drawn at random lies 1.25 away in the mean.
    assert min(away) < 0.1 and sum(away[10:]) / 20 < 0.85


def test_optuna_learns_from_the_best_rung_of_a_trial() -> None:
    proposals = Proposals(configured("algorithm=optuna", "num_trials=2"), [])
    for tune_name, rungs in {"tune-0": [140.0, 130.0, 150.0], "tune-1": []}.items():
        proposals.suggest(tune_name)
        for fid in rungs:
            proposals.on_trial_result(tune_name, {"score": fid})
        proposals.on_trial_complete(tune_name, {"score": rungs[-1]} if rungs else None)
    assert [trial.value for trial in proposals.study.trials] == [130.0, None]


def test_settings_change_the_configuration_and_nothing_else() -> None:
    config = configured()
    changed = config.with_settings({RATE: 0.5, RANK: 7})
    assert (changed.train.learning_rate, changed.train.lora.rank) == (0.5, 7)
    assert changed.train.lora.target_modules == config.train.lora.target_modules
    assert changed.with_settings({RATE: config.train.learning_rate, RANK: 32}) == config


def test_more_trials_a_larger_budget_or_other_guidance_go_on_with_what_was_measured(tmp_path: Path) -> None:
    storage = Storage.open(str(tmp_path))
    dataset = Dataset(storage, storage, Manifest(content="as they are"))

    def digest(*overrides: str) -> str:
        drawn = ("algorithm=random", "learning_rates={low: 1.0e-5, high: 1.0e-2}")
        return search_digest(configured(*drawn, "num_trials=4", *overrides), dataset)

    assert digest() == digest("num_trials=8", "max_steps=100", "patience=2", "guidance_scales=[1.0]")
    assert digest() != digest("space={train.lora.rank: [4, 8]}")
    assert digest() != digest("ladder=[80,160]")


def fold_row(trial: str, step: int, fold: int, fid: float) -> RungRow:
    scores: dict[str, Any]
    scores = {"fid": fid, "fid_error": 1.0, "kid": fid / 100, "kid_error": 0.1, "seconds": 10.0}
    return RungRow(trial_id=trial, step=step, fold=fold, training=f"{trial}_fold-{fold}", **scores)


def test_a_fold_trains_what_all_folds_before_it_have_measured_up_to_where_they_stopped() -> None:
    rows = [fold_row("a", 80, 0, 9.0), fold_row("a", 160, 0, 8.0), fold_row("b", 80, 0, 9.5)]
    assert standing(rows, 1) == {"a": 160, "b": 80}
    rows += [fold_row("a", 80, 1, 7.0)]
    assert standing(rows, 2) == {"a": 80}


def test_candidates_are_averaged_over_the_folds_that_all_measured_them() -> None:
    rows = [fold_row("a", 80, fold, fid) for fold, fid in enumerate((10.0, 14.0, 12.0))]
    rows += [fold_row("a", 160, 0, 1.0)]  # a fold only
    [row] = averaged(rows, 3)
    assert (row.step, row.fid, row.folds, row.seconds) == (80, 12.0, [10.0, 14.0, 12.0], 30.0)
    assert row.fid_error == pytest.approx(2 / 3**0.5)  # standard deviation 2, of three folds
    assert (row.fold, row.training_name) == (None, "a")


def test_folds_tell_apart_what_differs_in_each_however_much_the_folds_differ() -> None:
    """The folds lie 40 apart; one candidate is better by 1 in each of them, another one only on average."""
    hard = (10.0, 50.0, 90.0)
    rows = [fold_row("late", 160, fold, fid) for fold, fid in enumerate(hard)]
    rows += [fold_row("early", 80, fold, fid + 1) for fold, fid in enumerate(hard)]
    assert choose_over_folds(averaged(rows, 3)).trial_id == "late"
    rows = [row for row in rows if row.trial_id == "late"]
    rows += [
        fold_row("early", 80, fold, fid + gap)
        for fold, (fid, gap) in enumerate(zip(hard, (9, -4, -2), strict=True))
    ]
    found = choose_over_folds(averaged(rows, 3))
    assert found.trial_id == "early"
    assert found.behind and found.behind_error and 0 < found.behind < found.behind_error


def population_rows(members: list[Trial], fids: list[float]) -> list[RungRow]:
    return [
        RungRow(trial_id=m.trial_id, step=m.ladder[-1], fid=fid, checkpoint=f"at/{m.training}")
        for m, fid in zip(members, fids, strict=True)
    ]


def test_the_worst_members_go_on_from_the_best_with_settings_a_little_changed() -> None:
    config = configured("scheduler=population", "learning_rates=[1.0e-3,5.0e-4,2.0e-4,1.0e-4]")
    members = first_generation(config)
    assert [member.ladder for member in members] == [[80]] * 4
    rows = population_rows(members, [20.0, 10.0, 30.0, 40.0])
    following = next_generation(config, members, rows)
    assert [member.ladder for member in following] == [[80, 160]] * 4
    assert following[:3] == [Trial(m.trial_id, m.settings, [80, 160], m.training) for m in members[:3]]
    taken = following[3]
    assert (taken.trial_id, taken.start, taken.begins_at) == ("member-3", "at/member-1", 80)
    assert taken.training == "member-3_from-80"  # its former checkpoints stay
    assert taken.settings[RATE] in (4e-4, 6.25e-4) or taken.settings[RATE] in (1e-3, 5e-4, 2e-4, 1e-4)
    assert next_generation(config, members, rows) == following, "the same again after an interruption"


def test_a_member_that_failed_is_left_out() -> None:
    config = configured("scheduler=population", "learning_rates=[1.0e-3,5.0e-4,2.0e-4]")
    members = first_generation(config)
    rows = population_rows(members[:2], [20.0, 10.0])
    assert [member.trial_id for member in next_generation(config, members, rows)] == ["member-0", "member-1"]


def test_only_numbers_that_may_change_in_a_training_are_changed_and_stay_in_their_range() -> None:
    space: dict[str, list[Any] | Range] = {RATE: Range(low=1e-4, high=1e-3), RANK: [4, 8], DECAY: [0.0, 0.1]}
    for seed in range(50):
        found = perturbed({RATE: 9e-4, RANK: 8, DECAY: 0.1}, space, random.Random(seed))
        assert found[RANK] == 8
        assert 1e-4 <= found[RATE] <= 1e-3 and 0 <= found[DECAY] <= 0.1


class Differences:
    """Tells of any two rungs that their pictures are 0.5 ± 1 apart."""

    def difference(self, *pair: Any, measure: str = "fid") -> PairedDifference:
        return PairedDifference(0.5, 1.0, variance_ratio=4.0, num_samples=128, feature_network="inception")


def test_a_rung_that_was_compared_keeps_by_how_much_the_common_noise_made_that_surer() -> None:
    rows = [
        RungRow(trial_id="a", step=step, fid=fid, fid_error=3.0, checkpoint=f"a/{step}")
        for step, fid in ((80, 100.5), (160, 100.0), (320, 101.0))
    ]
    pool: Any = Differences()
    best, rows = choose(rows, pool)
    assert best is rows[0], "the tie goes to fewer steps"
    assert (best.behind, best.behind_error, best.variance_ratio) == (0.5, 1.0, 4.0)
    assert not any("variance_ratio" in row.fields() for row in rows[1:])
    others = [row | {"fid": row.fid + 1} for row in rows if row.step != 320] + [rows[2] | {"fid": 1.0}]
    pool.difference = lambda *pair, measure: PairedDifference(9.0, 1.0, math.inf, 128, "inception")
    _, rows = choose(others, pool)
    assert [row.behind for row in rows] == [9.0, 9.0, None], "a later start compares with its own best rung"


def test_a_range_is_drawn_from_evenly_in_the_logarithm() -> None:
    draw = random.Random(0)
    drawn = sorted(sample(Range(low=1e-5, high=1e-3), draw) for _ in range(1000))
    assert drawn[0] >= 1e-5 and drawn[-1] <= 1e-3
    assert 0.8e-4 < drawn[500] < 1.25e-4  # the middle of the decades
    drawn = sorted(sample(Range(low=0, high=1, log=False), draw) for _ in range(1000))
    assert 0.45 < drawn[500] < 0.55


INTEGERS = ("learning_rates={low: 1e-5, high: 1e-2}", "num_trials=40")


@pytest.mark.parametrize("log", ["true", "false"])
@pytest.mark.parametrize("algorithm", ["random", "optuna"])
def test_a_range_of_a_whole_number_draws_whole_ones(algorithm: str, log: str) -> None:
    space = f"space={{train.lora.rank: {{low: 4, high: 7, log: {log}}}, train.warmup_steps: [0, 5]}}"
    config = configured(f"algorithm={algorithm}", space, *INTEGERS)
    proposals = Proposals(config, [])
    drawn: list[Any] = (
        points(config) if algorithm == "random" else [proposals.suggest(f"tune-{n}") for n in range(40)]
    )
    assert {type(settings[RANK]) for settings in drawn} == {int}
    assert {settings[RANK] for settings in drawn} == {4, 5, 6, 7}, "both ends are among its values"
    for settings in drawn:
        assert config.with_settings(settings).train.lora.rank == settings[RANK]


@pytest.mark.parametrize("log", [True, False])
def test_whole_numbers_are_drawn_evenly(log: bool) -> None:
    draw, values = random.Random(0), IntegerRange(low=1, high=8, log=log)
    counts = Counter(sample(values, draw) for _ in range(4000))
    widths = {n: math.log((n + 0.5) / (n - 0.5)) if log else 1.0 for n in range(1, 9)}
    for number, width in widths.items():
        share = width / sum(widths.values())
        assert abs(counts[number] / 4000 - share) < 4 * math.sqrt(share * (1 - share) / 4000)


def test_whole_numbers_between_two_ends_are_counted() -> None:
    assert (
        configured("algorithm=random", "learning_rates=[1e-3]", "num_trials=4", RANKS).search.grid_size == 4
    )
    with pytest.raises(ConfigError, match="num_trials: 5, but the values have 4 combinations"):
        configured("algorithm=random", "learning_rates=[1e-3]", "num_trials=5", RANKS)


def test_a_population_begins_with_whole_numbers_and_takes_them_over() -> None:
    config = configured(
        "scheduler=population",
        "algorithm=random",
        "learning_rates={low: 1e-5, high: 1e-2}",
        "num_trials=4",
        RANKS,
    )
    members = first_generation(config)
    following = next_generation(config, members, population_rows(members, [20.0, 10.0, 30.0, 40.0]))
    for member in following:
        assert isinstance(config.with_settings(member.settings).train.lora.rank, int)
    assert following[3].settings[RANK] == members[1].settings[RANK]


@pytest.mark.parametrize("seed", range(20))
def test_a_population_changes_numbers_that_were_written_as_text(seed: int) -> None:
    space = "space={train.weight_decay: [1e-4, '1e-3'], train.caption_dropout: [0, 0.9999]}"
    config = configured("scheduler=population", "learning_rates=[1e-3,2e-3]", space)
    for settings in points(config):
        found = perturbed(settings, config.search.dimensions, random.Random(seed))
        assert 1e-4 <= found[DECAY] <= 1e-3
        config.with_settings(found)  # to three digits 0.9999 is 1, which no caption dropout may be


def test_a_drawn_number_stays_in_its_range_where_three_digits_would_leave_it() -> None:
    narrow = Range(low=0.99961, high=0.99972, log=False)
    drawn = [sample(narrow, random.Random(seed)) for seed in range(20)]
    assert all(narrow.low <= number <= narrow.high for number in drawn)


def test_values_of_the_space_are_recorded_as_their_settings_read_them() -> None:
    config = configured(
        "learning_rates=[1e-3]",
        "space={train.lora.rank: ['8', 4.0], train.lora.use_dora: ['yes', 'false'], "
        "train.weight_decay: [0, '1e-2'], train.betas: [['0.9', 0.99], [0.8, 0.9]]}",
    )
    assert config.search.space == {
        "train.lora.rank": [8, 4],
        "train.lora.use_dora": [True, False],
        "train.weight_decay": [0, 0.01],
        "train.betas": [[0.9, 0.99], [0.8, 0.9]],
    }
    assert Config.model_validate(read_yaml(config.to_yaml())) == config
    assert len({trial_id(settings) for settings in points(config)}) == 16


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["space={train.lora.rank: ['8', 8]}"], "search.space.train.lora.rank repeats a value"),
        (["space={train.weight_decay: [0.1, 1e-1]}"], "space.train.weight_decay repeats a value"),
        (["space={train.lora.use_dora: [yes, true]}"], "space.train.lora.use_dora repeats a value"),
        (["space={train.learning_rate: [0.1]}"], "give it as search.learning_rates"),
        (
            ["space={train.lora: [{rank: 4}, {rank: 8}], train.lora.alpha: [4, 8]}"],
            "space.train.lora.alpha is part of space.train.lora",
        ),
        ([*DRAWN, "space={train.lora.rank: {low: 4.5, high: 8}}"], "low: 4.5: must be a whole number"),
        (
            [*DRAWN, "space={train.lora.use_dora: {low: 0, high: 1, log: false}}"],
            "space.train.lora.use_dora: a range needs a setting of train that is a number; give values",
        ),
        (
            [*DRAWN, "space={train.deepspeed.gradient_clipping: {low: 0.1, high: 1}}"],
            "space.train.deepspeed.gradient_clipping: a range needs a setting",
        ),
        (
            [*DRAWN, "space={train.lora.rank: {low: 0, high: 8, log: false}}"],
            "search.space.train.lora.rank: 0",
        ),
        (
            ["space={train.batch_size: [1, 2]}"],
            "search.space.train.batch_size: 1: .*is less than the number of workers",
        ),
        (
            ["space={train.schedule: [constant, cosine], train.warmup_steps: [0, 5]}"],
            "train.schedule: 'constant' with train.warmup_steps: 5: .* schedule constant has no warm-up",
        ),
        (
            ["space={train.stages: [[{steps: 400}, {steps: 1}]]}"],
            "search.space.train.stages: .*the last stage begins after step 400",
        ),
        (
            ["algorithm=random", "num_trials=9", "learning_rates={low: 1.001e-3, high: 1.022e-3}"],
            "search.num_trials: 9, but the ranges give only 3 different trials",
        ),
        (["space={train.weight_decay: [.nan, 0.1]}"], "search.space.train.weight_decay: nan"),
    ],
)
def test_a_space_with_trials_that_cannot_be_is_refused_before_the_first(
    overrides: list[str], expected: str
) -> None:
    with pytest.raises(ConfigError, match=expected) as caught:
        configured(*overrides)
    assert "\n" not in str(caught.value)


def test_what_a_member_took_over_was_not_spent_again() -> None:
    config = configured("scheduler=population", "learning_rates=[1.0e-3,5.0e-4]")
    own = RungRow(trial_id="member-1", learning_rate=1e-3, step=80, fid=9.0, seconds=30.0)
    taken = own | {"training": "member-1_from-80", "step": 160, "begins_at": 80}
    assert taken.training_name == "member-1_from-80"
    assert [(each.trial_id, each.steps) for each in spent(config, [own, taken], {}).trials] == [
        ("member-1", 80),
        ("member-1_from-80", 80),
    ]


def test_steps_that_were_computed_while_the_last_rung_was_measured_are_spent_too() -> None:
    config = configured("learning_rates=[1.0e-3,5.0e-4]", "device_hour_price=2")
    rows = [
        RungRow(trial_id="lr-0.001", learning_rate=1e-3, step=320, fid=8.0, seconds=1800.0),
        RungRow(trial_id="lr-0.0005", learning_rate=5e-4, step=80, fid=9.0, seconds=900.0),
    ]
    found = spent(config, rows, {"lr-0.0005": 131, "lr-0.001_refit": 40})  # one that no count is known of
    assert [(each.steps, each.measured_steps, each.saved_steps) for each in found.trials] == [
        (131, 80, 189),
        (320, 320, 0),
    ]
    assert found.other_steps == 40
    told = bill(config, SearchResult("digest", rows, rows, rows[0], {"lr-0.0005": 131, "lr-0.001_refit": 40}))
    assert told == (
        "computed 451 of 640 steps, 400 of them up to a measured rung, 40 of trainings without a measured "
        "rung; 1.50 hours of workers, at 2 an hour 3.00"
    )


def test_a_search_says_beforehand_what_it_takes_at_most_and_what_it_does_not_count() -> None:
    assert at_most(configured()) == ["at most 2 x 320 = 640 steps"]
    assert at_most(configured("scheduler=halving", "max_steps=300")) == [
        "at most 400 steps, of 640 where no trial is stopped",
        "it ends at the rung where 300 steps are computed",
    ]
    priced = configured("device_hour_price=2", "guidance_scales=[1.0,2.0,5.0]", "max_steps=1000")
    assert at_most(priced)[1:] == [
        "at 2 an hour of a worker: what it comes to python -m cluster.plan tells from the speed",
        "and 4 scores, of each trial's best rung at [1.0, 5.0]",
    ]
    limited = [
        "search.device_hour_price=2",
        "search.max_hours=5",
        "search.max_cost=7",
        "evaluate.use_gpu=true",
    ]
    folds = ["search.folds=2", "data.folds=2"]
    assert at_most(load_config(DEMO, ["search.scheduler=asha", *limited, *folds])) == [
        "at most 4 x 320 = 1,280 steps",
        "it ends at the rung where 3.50 hours of workers are spent, which cost 7.00",
        "beyond that up to 320 steps, of the winner on all folds",
        "hours and cost are without those of the 2 evaluators' GPUs",
    ]
