"""When a search stops trials beside ASHA: patience and budget."""

from pathlib import Path
from typing import Any

import pytest

from ray_jobs.config import Config, ConfigError, load_config
from ray_jobs.run.records import RungRow
from ray_jobs.tuning.stopping import Budget, Patience, stoppers

DEMO = Path(__file__).parents[2] / "configs" / "demo.yaml"


def configured(*overrides: str) -> Config:
    return load_config(DEMO, ["train.num_workers=2", *(f"search.{setting}" for setting in overrides)])


def rung(step: int, rate: float = 1e-3, seconds: float = 0.0, **scores: Any) -> dict[str, Any]:
    return {
        "trial_id": f"lr-{rate:g}",
        "step": step,
        "time_total_s": seconds,
        "fid": 100.0,
        "score": 100.0,
        **scores,
    }


def recorded_rung(step: int, seconds: float) -> RungRow:
    return RungRow(trial_id="lr-0.001", step=step, fid=100.0, seconds=seconds)


def test_patience_ends_with_so_many_rungs_without_an_improvement_beyond_the_error() -> None:
    patience = Patience(2)
    fids = [140.0, 130.0, 129.0, 120.0, 119.0, 118.5]
    stopped = [patience("a", rung(n, score=fid, score_error=3.0)) for n, fid in enumerate(fids)]
    assert stopped == [False, False, False, False, False, True]
    again = [patience("a", rung(n, score=fid, score_error=3.0)) for n, fid in enumerate(fids)]
    assert not any(again), "a trial that starts again reports its rungs again"
    assert not patience("b", rung(1, score=200.0, score_error=3.0))  # another trial
    assert not patience.stop_all()


def test_a_result_without_a_score_is_no_rung() -> None:
    patience = Patience(1)
    assert not any(patience("a", {"step": step}) for step in range(3))


@pytest.mark.parametrize(
    ("limit", "rungs", "spent"),
    [
        ("max_steps=240", [rung(80), rung(160), rung(80, 2e-4)], [False, False, True]),
        ("max_hours=1", [rung(80, seconds=900), rung(80, 2e-4, seconds=900)], [False, True]),
        ("max_hours=1", [rung(80, seconds=900), rung(160, seconds=1700)], [False, False]),
    ],
    ids=[
        "steps of all trials",
        "two workers spend two hours an hour",
        "seconds of a trial are not added twice",
    ],
)
def test_the_search_stops_when_all_trials_together_have_spent_the_budget(
    limit: str, rungs: list[dict[str, Any]], spent: list[bool]
) -> None:
    budget = Budget(configured(limit), [], dict)
    found = []
    for row in rungs:
        assert not budget("any", row)  # it stops no single trial
        found.append(budget.stop_all())
    assert found == spent


def test_a_cost_is_hours_times_their_price() -> None:
    config = configured("max_cost=3", "device_hour_price=2")
    budget = Budget(config, [], dict)
    budget("a", rung(80, seconds=2600))
    assert not budget.stop_all()
    budget("a", rung(160, seconds=2800))
    assert budget.stop_all()


def test_what_an_earlier_start_has_spent_counts() -> None:
    recorded = [recorded_rung(80, 1000.0), recorded_rung(160, 1500.0)]
    budget = Budget(configured("max_hours=1"), recorded, dict)
    assert not budget.stop_all()
    budget("a", rung(160, seconds=1.0))  # reported again, since it is known
    assert not budget.stop_all()
    budget("a", rung(320, seconds=400.0))
    assert budget.stop_all()


def test_a_recorded_rung_that_tune_reports_under_its_own_name_counts_once() -> None:
    row = recorded_rung(80, 1000.0) | {"training": "lr-0.001"}
    budget = Budget(configured("max_steps=160"), [row], dict)
    budget("a", row.fields() | {"trial_id": "diffray_5f3a_00000", "time_total_s": 1.0})
    assert not budget.stop_all()


def test_steps_that_no_rung_has_count_and_the_search_stops_at_the_next_rung() -> None:
    computed = {"lr-0.001": 130, "lr-0.1": 20}  # one trains on behind its rung, another one has failed
    budget = Budget(configured("max_steps=240"), [recorded_rung(80, 1.0)], lambda: computed)
    computed |= {"lr-0.0002": 90}
    assert not budget.stop_all(), "in the middle of a rung"
    budget("a", rung(80, 2e-4))
    assert budget.stop_all()


def test_without_limits_nothing_stops() -> None:
    [budget] = stoppers(configured(), [], dict)
    budget("a", rung(10**9, seconds=1e9))
    assert not budget.stop_all()
    assert len(stoppers(configured("patience=3"), [], dict)) == 2


def test_a_highest_cost_needs_a_price() -> None:
    with pytest.raises(ConfigError, match="max_cost needs device_hour_price"):
        configured("max_cost=3")
