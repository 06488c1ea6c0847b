"""The simulated search: closed forms where there are some, and Tune's own decisions."""

import json
import math
import os
import random
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.schedulers import ASHAScheduler

from benchmarks.simulation.halving import Halving
from benchmarks.simulation.prediction import predicted, synthetic_scores
from benchmarks.simulation.runs import Clock, evaluations, scores_of, timing_of
from benchmarks.simulation.search import Cluster, Outcome, Plan, Scores, Simulation, Timing
from cluster.storage import Storage
from ray_jobs.evaluation.actor import FEATURES
from ray_jobs.run.records import RungRow
from ray_jobs.training.checkpoint import SERIES, folder_of

ONE = Timing(startup=[100.0], step=[0.5], evaluation=[60.0])


def simulated(
    plan: Plan, cluster: Cluster, timing: Timing = ONE, scores: Scores | None = None, seed: int = 0
) -> Outcome:
    level = scores or [dict.fromkeys(plan.ladder, 100.0)] * plan.trials
    return Simulation(plan, cluster, timing, level, random.Random(seed)).run()


def test_one_trial_takes_its_start_its_steps_and_the_measuring_of_its_last_rung() -> None:
    found = simulated(Plan(1, [200, 400, 800], workers=4), Cluster(4, evaluators=2, price=3.0))
    assert found.seconds == pytest.approx(100 + 800 * 0.5 + 60 / 2)
    assert found.worker_hours == pytest.approx(4 * found.seconds / 3600)
    assert found.cost == pytest.approx(3 * 6 * found.seconds / 3600)
    assert (found.steps, found.lost_steps, found.failures, found.reached) == (800, 0, 0, (800,))


def test_rungs_wait_for_the_evaluators_and_the_training_does_not_wait_for_them() -> None:
    slow = Timing(startup=[100.0], step=[0.5], evaluation=[300.0])
    found = simulated(Plan(1, [200, 400, 800]), Cluster(1), slow)
    assert found.seconds == pytest.approx(100 + 200 * 0.5 + 3 * 300)


def test_on_shared_cores_steps_and_measuring_hold_each_other_up() -> None:
    shared = Timing([100.0], [0.5], [60.0], step_beside=[0.8], evaluation_alone=[40.0])
    found = simulated(Plan(1, [200, 400, 800]), Cluster(1), shared)
    assert found.seconds == pytest.approx(100 + 200 * 0.5 + 600 * 0.8 + 40)


def test_as_many_trials_climb_at_once_as_there_are_devices_for() -> None:
    alone = simulated(Plan(1, [100], workers=2, concurrent=4), Cluster(8)).seconds
    quick = Timing(startup=[100.0], step=[0.5], evaluation=[0.0])
    waves = [
        simulated(Plan(6, [100], workers=2, concurrent=4, asha=False), Cluster(n), quick).seconds
        for n in (2, 4, 8)
    ]
    assert waves == pytest.approx([6 * 150, 3 * 150, 2 * 150]) and alone == pytest.approx(210)


@pytest.mark.parametrize("seed", range(5))
def test_twice_the_devices_are_never_slower_without_failures(seed: int) -> None:
    draw = random.Random(seed)
    varied = Timing(
        startup=[draw.uniform(10, 200) for _ in range(5)],
        step=[draw.uniform(0.1, 2) for _ in range(5)],
        evaluation=[0.0],
    )
    plan = Plan(12, [100, 200], workers=2, concurrent=12, asha=False)
    times = [simulated(plan, Cluster(n), varied, seed=seed).seconds for n in (2, 4, 8, 16, 32)]
    assert times == sorted(times, reverse=True)


def test_with_failures_the_mean_is_that_of_restarts_from_checkpoints() -> None:
    """Daly's complete model (Future Generation Computer Systems 22, 2006): with checkpoints that cost
    nothing every T seconds, restarts of R seconds that may fail too, and M seconds between failures, each
    interval takes M exp(R / M) (exp(T / M) - 1) on average."""
    interval, restart, mtbf, intervals = 200.0, 50.0, 300.0, 10
    plan = Plan(1, [int(intervals * interval)], asha=False, checkpoint_s=interval)
    cluster = Cluster(1, devices_a_node=1, node_mtbf=mtbf, restart=restart)
    times = [
        simulated(plan, cluster, Timing(startup=[0.0], step=[1.0], evaluation=[0.0]), seed=seed).seconds
        for seed in range(1000)
    ]
    expected = intervals * mtbf * math.exp(restart / mtbf) * (math.exp(interval / mtbf) - 1)
    # The simulation loses whole steps, which makes the time longer by less than a step a failure.
    assert mean(times) == pytest.approx(expected, abs=3 * stdev(times) / math.sqrt(len(times)))


def test_a_node_that_fails_ends_the_trainings_on_it_alone() -> None:
    plan = Plan(4, [3600], workers=2, concurrent=4, asha=False, checkpoint_s=600)
    steady = Timing(startup=[0.0], step=[1.0], evaluation=[0.0])
    packed = predicted(
        plan, Cluster(8, devices_a_node=8, node_mtbf=7200, restart=0), steady, flat(plan), replicates=300
    )
    apart = predicted(
        plan, Cluster(8, devices_a_node=2, node_mtbf=7200, restart=0), steady, flat(plan), replicates=300
    )
    # Four nodes fail four times as often, and each takes one training along instead of four.
    assert apart["failures"]["mean"] > 3 * packed["failures"]["mean"]
    assert apart["lost_steps"]["mean"] == pytest.approx(packed["lost_steps"]["mean"], rel=0.25)


def flat(plan: Plan) -> Any:
    return lambda draw: [dict.fromkeys(plan.ladder, 100.0)] * plan.trials


def test_the_same_seed_gives_the_same_search() -> None:
    plan, cluster = Plan(8, [100, 200, 400], workers=4, concurrent=4), Cluster(16, node_mtbf=3600)

    def drawn(seed: int) -> dict[str, dict[str, float]]:
        return predicted(
            plan, cluster, ONE, lambda draw: synthetic_scores(8, plan.ladder, draw), replicates=5, seed=seed
        )

    assert drawn(0) == drawn(0) != drawn(1)


def test_asha_stops_the_worse_half() -> None:
    plan = Plan(200, [100, 200, 400])
    fids = [random.Random(trial).gauss(100, 10) for trial in range(200)]
    reached = simulated(plan, Cluster(1), scores=[dict.fromkeys(plan.ladder, fid) for fid in fids]).reached
    stopped = [fid for fid, step in zip(fids, reached, strict=True) if step == 100]
    went_on = [fid for fid, step in zip(fids, reached, strict=True) if step > 100]
    assert len(stopped) == pytest.approx(100, abs=15)
    assert mean(stopped) > mean(went_on) + 10
    assert reached.count(400) == pytest.approx(50, abs=15)


def test_a_trial_trains_on_while_the_rung_that_stops_it_is_measured() -> None:
    plan, scores = Plan(2, [100, 1000]), [{100: 1.0, 1000: 1.0}, {100: 2.0, 1000: 2.0}]
    found = simulated(plan, Cluster(1), scores=scores)
    assert found.reached == (1000, 100) and found.steps == 1000 + 100 + 60 / 0.5


@pytest.mark.parametrize("factor", [2, 3])
def test_it_stops_the_trials_that_tunes_scheduler_stops(factor: int) -> None:
    ladder = [80 * factor**k for k in range(4)]
    draw = random.Random(factor)
    for _ in range(20):
        ours = Halving(ladder, factor)
        tunes = ASHAScheduler(
            time_attr="step",
            metric="fid",
            mode="min",
            max_t=ladder[-1],
            grace_period=ladder[0],
            reduction_factor=factor,
        )
        trials = [SimpleNamespace(trial_id=str(number)) for number in range(12)]
        for trial in trials:
            tunes.on_trial_add(None, trial)
        climbing = {number: list(ladder[:-1]) for number in range(12)}
        while climbing:
            number = draw.choice(list(climbing))
            step, fid = climbing[number].pop(0), draw.gauss(100, 10)
            decided = tunes.on_trial_result(None, trials[number], {"step": step, "fid": fid})
            assert ours.stops(number, step, fid) == (decided == "STOP")
            if decided == "STOP" or not climbing[number]:
                del climbing[number]


def test_seconds_are_read_from_a_runs_files(tmp_path: Path) -> None:
    began, trial = 1_000_000.0, Storage.open(str(tmp_path))
    rows: list[RungRow] = []
    for step, measured in ((10, 95.0), (20, 130.0)):
        pace = 2 if step == 10 else 3
        last = began + 70 + 3 * (step - 10)
        series = [{"step": n, "time": last - pace * (step - n)} for n in range(step - 9, step + 1)]
        trial.child(folder_of(step)).write_text(SERIES, json.dumps(series))
        write_at(trial, step, began + measured)
        rows.append(RungRow(trial_id="one", step=step, seconds=measured, fid=100.0 - step))
    clock = Clock(trial, rows)
    assert (clock.began, clock.ended) == (
        pytest.approx(began, abs=0.01),
        pytest.approx(began + 130, abs=0.01),
    )
    assert clock.step_s == pytest.approx(2) and clock.startup == pytest.approx(50, abs=0.01)
    assert clock.steps_beside == pytest.approx([3])
    # The second rung is reached at 100 and begun then, since the first is done at 95.
    (_, first), (_, second) = evaluations([clock])
    assert (first, second) == (pytest.approx(95 - 70, abs=0.01), pytest.approx(130 - 100, abs=0.01))
    assert scores_of({"one": rows}, [10, 20, 40]) == [{10: 90.0, 20: 80.0, 40: 80.0}]


def write_at(trial: Storage, step: int, when: float) -> None:
    trial.child(folder_of(step)).write_bytes(FEATURES, b"")
    os.utime(Path(trial.path, folder_of(step), FEATURES), (when, when))


def test_seconds_of_lines_alone_give_back_the_times_of_the_rungs() -> None:
    rows = [
        RungRow(trial_id="one", step=step, fid=9.0, seconds=100 + 0.5 * step + 30) for step in (80, 160, 320)
    ]
    found = timing_of({"one": rows, "stopped": rows[:1]}, evaluators=2)
    assert list(found.step) == pytest.approx([0.5])
    measuring = only(found.evaluation) / 2
    assert only(found.startup) + 80 * 0.5 + measuring == pytest.approx(rows[0].seconds)


def only(values: Sequence[float]) -> float:
    [value] = values
    return value
