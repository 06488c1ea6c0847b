"""Searches that were made, as the simulation takes them: the plan, seconds, FIDs, and the real time.

Of a run folder (`<storage>/<name>`) the lines of results.jsonl tell when each rung was measured, on its
trial's clock; `series.json` of its checkpoints when each step ended; and the time of the rung's features in
the storage joins the two clocks, to within the seconds that errors and validation loss take. The search must
not have been interrupted. Of benchmarks/results/search.json only the lines are there: a step is what lies
between a trial's first and last rung, and measuring takes at most what lies between two of its rungs.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median

from benchmarks.simulation.search import Plan, Scores, Timing
from cluster.storage import Storage
from ray_jobs.config import Config, load_config
from ray_jobs.evaluation.actor import FEATURES
from ray_jobs.run.folder import CONFIG, RunFolder
from ray_jobs.run.records import RungRow, read_rows
from ray_jobs.training.checkpoint import SERIES, folder_of, steps_of

Rows = list[RungRow]


@dataclass(frozen=True)
class Run:
    """A search that was made.

    Attributes:
        seconds: from the first trial's beginning to the last rung.
        worker_hours: of devices that trials held.
    """

    name: str
    plan: Plan
    evaluators: int
    price: float
    timing: Timing
    scores: Scores
    seconds: float
    worker_hours: float


def plan_of(config: Config, trials: int) -> Plan:
    search = config.search
    return Plan(
        trials,
        search.ladder,
        workers=config.train.min_workers,
        concurrent=search.max_concurrent_trials,
        asha=search.scheduler == "asha",
        reduction_factor=search.reduction_factor,
        checkpoint_s=60 * config.train.checkpoint_minutes,
    )


def by_trial(rows: Rows) -> dict[str, Rows]:
    """In the order in which trials were first measured."""
    found: dict[str, Rows] = {}
    for row in rows:
        found.setdefault(row.training_name, []).append(row)
    return found


def scores_of(trials: dict[str, Rows], ladder: Sequence[int]) -> Scores:
    """Of rungs that were not measured, because the trial was stopped, the score of its last one."""
    found = []
    for rows in trials.values():
        fids: dict[int, float] = {row.step: row.score for row in rows}
        last = fids[rows[-1].step]
        found.append({step: fids.get(step, last) for step in ladder})
    return found


def read_run(folder: str) -> Run:
    """A run's search, from its storage.

    Raises:
        ValueError: nothing was measured there.
    """
    run = RunFolder(Storage.open(folder))
    trials = by_trial(read_rows(run.search))
    if not trials:
        raise ValueError(f"{folder}: has no search/results.jsonl; name a run's folder, as runs/demo")
    clocks = {name: Clock(run.training(name), rows) for name, rows in trials.items()}
    config = load_config(Path(clocks[next(iter(clocks))].folder.child(CONFIG).uri))
    plan = plan_of(config, len(trials))
    begins, ends = (sorted(getattr(clock, end) for clock in clocks.values()) for end in ("began", "ended"))
    # From a trial's end to the beginning of the next one's clock.
    between = [later - end for end, later in zip(ends, begins[plan.concurrent :], strict=False)]
    launch = max(0.0, mean(between)) if between else 0.0
    held = sum(clock.ended - clock.began for clock in clocks.values()) + launch * len(between)
    return Run(
        name=Path(folder).name,
        plan=plan,
        evaluators=config.evaluate.num_actors,
        price=config.search.device_hour_price or 0.0,
        timing=measured_timing(list(clocks.values()), config, launch),
        scores=scores_of(trials, plan.ladder),
        seconds=ends[-1] - begins[0],
        worker_hours=held / 3600 * plan.workers,
    )


def measured_timing(clocks: Sequence["Clock"], config: Config, launch: float) -> Timing:
    """Of a run's trials, each after a pause of `launch` seconds."""
    last, actors = config.search.ladder[-1], config.evaluate.num_actors
    measuring = evaluations(clocks)
    beside = [actors * seconds for step, seconds in measuring if step != last]
    alone = [actors * seconds for step, seconds in measuring if step == last]
    return Timing(
        startup=[launch + clock.startup for clock in clocks],
        step=[clock.step_s for clock in clocks],
        evaluation=beside or alone,
        step_beside=[each for clock in clocks for each in clock.steps_beside],
        evaluation_alone=alone,
    )


class Clock:
    """When what happened in a trial, in seconds since 1970.

    Attributes:
        folder: of its first rung's checkpoint.
        began, ended: the trial, on Tune's clock.
        startup: seconds from its beginning to its first step.
        step_s: mean seconds of a step up to the first rung.
        steps_beside: of one after that; empty if it was not trained further.
        rungs: step, when it was reached, and when it was measured.
    """

    def __init__(self, trial: Storage, rows: Rows) -> None:
        times: dict[int, float] = {}
        for step in steps_of(trial):
            series = json.loads(trial.child(folder_of(step)).read_text(SERIES))
            times |= {row["step"]: row["time"] for row in series}
        first, rung, last = min(times), rows[0].step, max(times)
        self.folder = trial.child(folder_of(rung))
        self.began = median(_written(trial, row.step) - row.seconds for row in rows)
        self.ended = self.began + rows[-1].seconds
        self.step_s = (times[rung] - times[first]) / (rung - first)
        self.steps_beside = [(times[last] - times[rung]) / (last - rung)] if last > rung else []
        self.startup = times[first] - self.step_s - self.began
        self.rungs = [(row.step, times[row.step], self.began + row.seconds) for row in rows]


def _written(trial: Storage, step: int) -> float:
    """When a rung's features were written."""
    folder = trial.child(folder_of(step))
    info = folder.filesystem.get_file_info(f"{folder.path}/{FEATURES}")
    return float(info.mtime.timestamp())


def evaluations(clocks: Sequence[Clock]) -> list[tuple[int, float]]:
    """Step and seconds of each rung that was measured, since it was reached and the one before was done."""
    rungs = sorted((rung for clock in clocks for rung in clock.rungs), key=lambda rung: rung[2])
    found, free_at = [], 0.0
    for step, reached, measured in rungs:
        found.append((step, max(0.0, measured - max(reached, free_at))))
        free_at = measured
    return found


def read_benchmark(results: Path, kind: str, config: Config) -> list[Run]:
    """The grids, or the searches with ASHA, of `benchmarks.search`: one a seed, one trial after the other.

    Args:
        kind: grid or search.
        config: that they were made with.
    """
    found = []
    for each in json.loads(results.read_text())["seeds"]:
        if kind != "grid" and "asha" not in each["searches"]:
            raise ValueError(f"{results}: seed {each['seed']}: run benchmarks.search --scheduler asha first")
        made = each["grid"] if kind == "grid" else each["searches"]["asha"]
        trials = by_trial([RungRow.model_validate(row) for row in made["rungs"]])
        plan = plan_of(config, len(trials))
        seconds = sum(rows[-1].seconds for rows in trials.values())
        found.append(
            Run(
                name=f"{kind}, seed {each['seed']}",
                plan=plan,
                evaluators=config.evaluate.num_actors,
                price=config.search.device_hour_price or 0.0,
                timing=timing_of(trials, config.evaluate.num_actors),
                scores=scores_of(trials, plan.ladder),
                seconds=seconds,
                worker_hours=seconds / 3600 * plan.workers,
            )
        )
    return found


def timing_of(trials: dict[str, Rows], evaluators: int) -> Timing:
    """From the lines alone, of trials with two measured rungs or more."""
    climbs = [rows for rows in trials.values() if len(rows) > 1]
    startups, steps, measuring = [], [], []
    for rows in climbs:
        gaps = [later.seconds - row.seconds for row, later in zip(rows, rows[1:], strict=False)]
        steps.append(sum(gaps) / (rows[-1].step - rows[0].step))
        measuring.append(min(gaps))
        startups.append(max(0.0, rows[0].seconds - rows[0].step * steps[-1] - measuring[-1]))
    return Timing(startups, steps, [evaluators * each for each in measuring])
