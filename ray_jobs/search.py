"""Search: one trial a learning rate, each climbing the ladder of steps; the best rung of all wins.

    python -m ray_jobs.search --config configs/demo.yaml

Writes `<storage>/<run>/search/results.jsonl`, a line a rung. ASHA (Li et al., arXiv 1810.05934) stops a
trial whose validation FID at a rung is not among the best. The winner is the rung of the lowest FID, or one
of fewer steps that the error does not tell from it. An interrupted search goes on: measured rungs are not
measured again, and a training resumes from its last checkpoint.
"""

from typing import Any

from ray import tune
from ray.tune import Callback
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import ASHAScheduler
from ray.tune.stopper import CombinedStopper

from cluster.storage import Storage
from ray_jobs.config import Config
from ray_jobs.data.dataset import Dataset
from ray_jobs.evaluate import EvaluatorPool, evaluators
from ray_jobs.prepare import prepare
from ray_jobs.progress import say, watched_board
from ray_jobs.search_results import (
    FIELDS,
    FINISHED,
    RESULTS,
    SearchResult,
    bill,
    choose,
    finished,
    read_result,
    read_rows,
    result,
    search_digest,
    with_error,
)
from ray_jobs.stage import run_stage
from ray_jobs.stopping import stoppers
from ray_jobs.tracking import opened_store, tracked
from ray_jobs.train import (
    build_trainer,
    check_diverged,
    checked,
    trial_id,
)
from ray_jobs.training.checkpoint import Rung, find_rungs, folder_of
from ray_jobs.training.meter import RUNG


def search(config: Config, dataset: Dataset, pool: EvaluatorPool) -> SearchResult:
    """Run the stage, or what is left of it.

    Raises:
        RuntimeError: if no trial reached a rung.
    """
    run = Storage.open(config.storage).child(config.name)
    storage, digest = run.child("search"), search_digest(config, dataset)
    if storage.exists("digest") and storage.read_text("digest") != digest:
        say("search", "the settings or the data have changed: starting over")
        storage.delete("")
        run.delete("train")
    storage.write_text("digest", digest)
    if before := read_result(config, dataset):
        say("search", "unchanged, skipped")
        return before
    trials, last = len(config.search.learning_rates), config.search.ladder[-1]
    say("search", f"at most {trials} x {last:,} = {trials * last:,} steps")
    with opened_store(config):
        pool.load("validation")
    errors = _tune(config, dataset, pool, storage)
    rows = read_rows(storage)
    if not rows:
        raise RuntimeError(f"no trial reached its first rung: {errors}")
    for error in errors:
        say("search", f"a trial failed and is left out: {error}")
    best = choose(rows, pool)
    storage.write_lines(RESULTS, rows)
    if not errors:
        storage.write_text(FINISHED, finished(config, dataset, best))
    lowest = min(row["fid"] for row in rows)
    tie = "" if best["fid"] == lowest else f", not told from the lowest ({lowest:.1f}) and of fewer steps"
    what = f"{best['trial_id']} at step {best['step']}"
    say("search", f"winner: {what}, validation FID {with_error(best)}{tie}")
    say("search", bill(config, rows))
    return result(config, dataset, rows, best)


def _tune(config: Config, dataset: Dataset, pool: EvaluatorPool, storage: Storage) -> list[str]:
    """Run all trials; returns the errors of those that failed."""
    recorded = read_rows(storage)
    if recorded:
        say("search", f"going on after {len(recorded)} measured rungs")
    storage.delete("tune")
    trials = {trial_id(rate): config.with_learning_rate(rate) for rate in config.search.learning_rates}
    mirrored = tracked(config, trials, dataset.manifest["digest"], lambda: read_rows(storage))
    with watched_board() as board, mirrored:
        trial = tune.with_parameters(
            run_trial, config=config, dataset=dataset, pool=pool, board=board, recorded=recorded
        )
        results = _tuner(config, trial, storage, recorded).fit()
    return [str(error).strip().splitlines()[-1] for error in results.errors]


def _tuner(config: Config, trial: Any, storage: Storage, recorded: list[dict[str, Any]]) -> tune.Tuner:
    """A grid over the learning rates under ASHA, whose rungs are the ladder's where that doubles."""
    rates, ladder = config.search.learning_rates, config.search.ladder
    return tune.Tuner(
        tune.with_resources(trial, {"CPU": 1}),
        param_space={"learning_rate": tune.grid_search(list(rates))},
        tune_config=tune.TuneConfig(
            metric="fid",
            mode="min",
            max_concurrent_trials=config.search.max_concurrent_trials,
            scheduler=ASHAScheduler(
                time_attr="step",
                max_t=ladder[-1],
                grace_period=ladder[0],
                reduction_factor=config.search.reduction_factor,
            ),
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=storage.uri,
            verbose=0,
            callbacks=[Recorder(storage, recorded, ladder[-1], len(rates))],
            stop=CombinedStopper(*stoppers(config, recorded)),
        ),
    )


def run_trial(
    space: dict[str, Any],
    *,
    config: Config,
    dataset: Dataset,
    pool: EvaluatorPool,
    board: Any,
    recorded: list[dict[str, Any]],
) -> None:
    """What Tune runs: climb the ladder at one learning rate, reporting the FID at each rung."""
    rate = space["learning_rate"]
    name = trial_id(rate)
    known = {row["step"]: row for row in recorded if row["trial_id"] == name}
    config = config.with_learning_rate(rate)
    trainings = Storage.open(config.storage).child(config.name, "train")
    rungs = find_rungs(trainings).get(name, [])
    for rung in rungs:
        step = rung.metrics["step"]
        tune.report(known[step] if step in known else _row(name, rate, rung, pool))
    if not rungs or rungs[-1].metrics["step"] < config.search.ladder[-1]:
        callback = RungCallback(name, rate, pool, trainings.child(name))
        build_trainer(config, dataset, callbacks=[callback], board=board).fit()
        check_diverged(trainings.child(name))


def _row(name: str, rate: float, rung: Rung, pool: EvaluatorPool) -> dict[str, Any]:
    """A rung's line: what the training reported, and the scores of its weights, of which samples are kept."""
    scores = pool.score(rung.weights, "validation", Storage.open(rung.uri))
    measured = {"trial_id": name, "learning_rate": rate, "checkpoint": rung.uri}
    measured["validation_loss"] = pool.validation_loss(rung.weights)
    return rung.metrics | measured | scores.row() | scores.second_network


class RungCallback(TuneReportCallback):
    """In the training's controller: measure each checkpoint, then tell Tune, whose scheduler decides.

    The workers train on towards the next rung meanwhile.
    """

    def __init__(self, name: str, rate: float, pool: EvaluatorPool, trial: Storage) -> None:
        super().__init__()
        self.name, self.rate, self.pool, self.trial = name, rate, pool, trial

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        if metrics[0]["why"] != RUNG:
            return  # a checkpoint to go on from, between rungs
        # Not `checkpoint.path`, which on s3:// and gs:// lacks the scheme.
        rung = Rung(self.trial.child(folder_of(metrics[0]["step"])).uri, metrics[0])
        super().after_report(run_context, [_row(self.name, self.rate, rung, self.pool)], checkpoint)


class Recorder(Callback):
    """In Tune's driver: writes each rung to results.jsonl as it comes in, and says so."""

    def __init__(self, storage: Storage, rows: list[dict[str, Any]], last_step: int, num_trials: int) -> None:
        self.storage, self.rows = storage, list(rows)
        self.last_step, self.num_trials = last_step, num_trials
        self.started: list[str] = []

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.started.append(trial.trial_id)
        name = trial_id(trial.config["learning_rate"])
        say("search", f"trial {len(self.started)}/{self.num_trials}: {name}, starting its workers")

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        if "fid" not in result:
            return
        name = trial_id(trial.config["learning_rate"])
        known = result | {"trial_id": name, "seconds": result["time_total_s"]}
        row = {field: known[field] for field in FIELDS if field in known}
        if any((row["trial_id"], row["step"]) == (old["trial_id"], old["step"]) for old in self.rows):
            return
        self.rows.append(row)
        self.storage.write_lines(RESULTS, self.rows)
        say(
            "search",
            f"{name}  rung {row['step']}/{self.last_step}: validation FID {with_error(row)}, "
            f"loss {row['train_loss']:.4f}, {row['images_per_second']:.0f} images/s",
        )

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        step = (trial.last_result or {}).get("step", 0)
        if step < self.last_step:
            say("search", f"{trial_id(trial.config['learning_rate'])} stopped at rung {step}")


def _run(config: Config) -> SearchResult:
    dataset = prepare(config, check=checked(config))
    with evaluators(config, dataset) as pool:
        return search(config, dataset, pool)


if __name__ == "__main__":
    run_stage(__doc__, _run)
