"""Search: trials that differ in learning rate and what else is searched climb the ladder of steps; the best
rung of all wins.

    python -m ray_jobs.search --config configs/demo.yaml [--max-steps N] [--max-hours N] [--max-cost N]

Writes `<storage>/<run>/search/results.jsonl`, a line a rung. `search.scheduler` stops trials: by default ASHA
(Li et al., arXiv 1810.05934) one whose validation FID at a rung is not among the best. The winner is the rung
of the lowest FID, or one of fewer steps that the error does not tell from it. An interrupted search goes on:
measured rungs are not measured again, and a training resumes from its last checkpoint.
"""

import argparse
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from cluster.storage import Storage
from ray_jobs.config import Config, add_budget_arguments
from ray_jobs.data.dataset import Dataset
from ray_jobs.evaluate import EvaluatorPool, evaluators
from ray_jobs.feature_networks import check_networks
from ray_jobs.folds import choose_over_folds, splits, standing
from ray_jobs.guidance import choose_guidance
from ray_jobs.halving import all_trials, best_trials
from ray_jobs.population import first_generation, next_generation
from ray_jobs.prepare import prepare
from ray_jobs.progress import phase, say, watched_board
from ray_jobs.registry import check_store
from ray_jobs.search_results import (
    FINISHED,
    RESULTS,
    SearchResult,
    at_most,
    bill,
    candidates,
    choose,
    finished,
    read_result,
    read_rows,
    result,
    search_digest,
    with_error,
)
from ray_jobs.stage import run_stage
from ray_jobs.tracking import Mirror, opened_store, tracked
from ray_jobs.train import checked
from ray_jobs.trial import Surroundings, Trial, refitted
from ray_jobs.trials import Trials


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
    for line in at_most(config):
        say("search", line)
    phase("evaluators and the base's scores")
    with opened_store(config):
        for split in splits(config):
            pool.load(split)
    storage.delete("tune")
    with watched_board() as board, _mirrored(config, dataset) as mirror:
        done = Trials(Surroundings(config, dataset, pool, board, read_rows(storage)), storage, mirror)
        phase("workers")
        run_trials(config, done)
        if not done.rows:
            raise RuntimeError(f"no trial reached its first rung: {done.errors}")
        best = _chosen(config, done)
        done.computed.take()
    storage.write_lines(RESULTS, done.rows)
    if not done.errors:
        storage.write_text(FINISHED, finished(config, dataset, best))
    found = result(config, dataset, done.rows, best)
    _tell(config, found)
    return found


def _mirrored(config: Config, dataset: Dataset) -> AbstractContextManager[Mirror]:
    storage = Storage.open(config.storage).child(config.name, "search")
    return tracked(config, {}, dataset.manifest["digest"], lambda: read_rows(storage))


def run_trials(config: Config, done: "Trials") -> None:
    """All that is trained before the winner is chosen."""
    search, ladder = config.search, config.search.ladder
    first = 0 if search.folds else None
    if search.scheduler == "population":
        run_generations(config, done, first_generation(config), next_generation)
    elif search.scheduler == "halving":
        run_generations(config, done, all_trials(config, first), best_trials)
    else:
        done.run_space(partial(Trial.of, ladder=ladder, fold=first))
    for fold in range(1, search.folds):
        left = standing(done.rows, fold)
        upwards = {name: [step for step in ladder if step <= last] for name, last in left.items()}
        done.run_all([Trial.of(done.settings[name], rungs, fold) for name, rungs in upwards.items()])


Following = Callable[[Config, list[Trial], list[dict[str, Any]]], list[Trial]]
"""Who climbs to the next rung, of those that were measured at one."""


def run_generations(config: Config, done: "Trials", trials: list[Trial], following: Following) -> None:
    """A generation a rung: all of it is measured before the next one begins."""
    while trials and not done.budget_is_spent:
        done.run_all(trials)
        if trials[0].ladder == config.search.ladder or done.budget_is_spent:
            return
        before, trials = trials, following(config, trials, done.rows)
        if len(trials) < len(before):
            names = ", ".join(trial.training for trial in trials)
            say("search", f"rung {before[0].ladder[-1]}: of {len(before)} trials go on: {names or 'none'}")


def _chosen(config: Config, done: "Trials") -> dict[str, Any]:
    """The row of the candidate that wins."""
    rows, pool = candidates(config, done.rows), done.around.pool
    if not config.search.folds:
        return choose_guidance(config, rows, choose(rows, pool), pool)
    if not rows:
        raise RuntimeError("search.folds: no rung was measured in all folds; see search/results.jsonl")
    best = choose_over_folds(rows)
    say("search", f"{best['trial_id']} at step {best['step']}: training it on all folds together")
    trial = Trial.of(done.settings[best["trial_id"]], config.search.ladder)
    return best | {"checkpoint": refitted(trial, best["step"], done.around).uri}


def _tell(config: Config, found: SearchResult) -> None:
    best, lowest = found.winner, min(row["fid"] for row in found.rows)
    tie = "" if best["fid"] <= lowest else f", not told from the lowest ({lowest:.1f}) and of fewer steps"
    what = f"{best['trial_id']} at step {best['step']}"
    over = f" over {config.search.folds} folds" if config.search.folds else ""
    say("search", f"winner: {what}, validation FID{over} {with_error(best)}{tie}")
    say("search", bill(config, found))


def _run(config: Config, arguments: argparse.Namespace) -> SearchResult:
    check_store(config)
    check_networks(config.evaluate)
    dataset = prepare(config, check=checked(config))
    with evaluators(config, dataset) as pool:
        return search(config, dataset, pool)


if __name__ == "__main__":
    run_stage(__doc__, _run, add_budget_arguments)
