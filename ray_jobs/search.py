"""Search learning rates and other settings: each trial climbs the ladder of steps, and the best rung wins.

    python -m ray_jobs.search --config configs/demo.yaml [--max-steps N] [--max-hours N] [--max-cost N]

Writes `<storage>/<run>/search/results.jsonl`, one line per rung. `search.scheduler` stops bad trials: the
default, ASHA (Li et al., arXiv 1810.05934), stops a trial whose validation score (`search.rank_by`) at a rung
is not among the best. The winner is the rung with the lowest score, or an earlier one within the error of the
difference. An interrupted search resumes: no rung is scored twice, and each training continues from its last
checkpoint.
"""

import argparse
from contextlib import AbstractContextManager, ExitStack
from functools import partial

from cluster.promise import promised
from ray_jobs.config import Config, add_budget_arguments
from ray_jobs.console import phase, say
from ray_jobs.console.board import watched_board
from ray_jobs.data.feeding.dataset import Dataset
from ray_jobs.data.preparation import prepare
from ray_jobs.evaluation.cross_validation import splits
from ray_jobs.evaluation.pool import EvaluatorPool, evaluators
from ray_jobs.planning.checks import checked
from ray_jobs.planning.settled import settled
from ray_jobs.registry.models import check_store
from ray_jobs.run.command_line import run_stage
from ray_jobs.run.folder import RunFolder
from ray_jobs.run.records import FID, MEASURES, read_rows, write_rows
from ray_jobs.training.tracking import Mirror, opened_store, tracked
from ray_jobs.tuning.driver import Trials
from ray_jobs.tuning.packing import packing
from ray_jobs.tuning.results import (
    FINISHED,
    TUNE,
    SearchResult,
    at_most,
    bill,
    finished,
    read_result,
    result,
    search_digests,
    with_error,
)
from ray_jobs.tuning.scheduling import choose_winner, run_trials
from ray_jobs.tuning.trial import SearchContext
from ray_jobs.weights.feature_networks import check_networks


def search(config: Config, dataset: Dataset, pool: EvaluatorPool) -> SearchResult:
    """Run the stage, resuming where an earlier start stopped.

    Raises:
        RuntimeError: no trial reached a rung.
    """
    run = RunFolder.of(config)
    storage, digests = run.search, search_digests(config, dataset)
    if storage.exists("digest") and storage.read_text("digest") not in digests:
        say("search", "settings or data have changed; starting over")
        storage.delete("")
        run.trainings.delete("")
    storage.write_text("digest", digests[0])
    if before := read_result(config, dataset):
        say("search", "unchanged, skipped")
        return before
    for line in at_most(config):
        say("search", line)
    if config.not_together:
        say("search", config.not_together)
    storage.delete(TUNE)
    recorded = read_rows(storage)
    if any(row.ranked_by == FID for row in recorded):  # a release that knew nothing else measured them
        pool.rank_by = FID
    with watched_board() as board, ExitStack() as workers:
        phase("workers")
        with opened_store(config):
            pool.wait_until_placed()  # before workers that are elastic take their places
            # Trials start while real pictures are measured, and wait for it with their first rungs.
            ready = workers.enter_context(promised(partial(_ready, config, pool)))
            # Workers of a pack start before their trials, unless all rungs may be measured already.
            queue = workers.enter_context(packing(config, board, at_once=not recorded))
        with _mirrored(config, dataset) as mirror:
            done = Trials(SearchContext(config, dataset, ready, board, queue), storage, mirror)
            run_trials(config, done)
            ready.wait()
            if not config.search.folds:  # else the winner is yet to be trained on all of them
                workers.close()
            if not done.rows:
                raise RuntimeError(f"no trial reached its first rung: {done.errors}")
            best = choose_winner(config, done)
            workers.close()
            done.computed.take()
    write_rows(storage, done.rows)
    content = finished(config, dataset, best)
    if not done.errors:
        storage.write_text(FINISHED, content)
    found = result(config, content, done.rows, best)
    _tell(config, found)
    return found


def _ready(config: Config, pool: EvaluatorPool) -> EvaluatorPool:
    """Measure the real pictures that rungs are compared with, and return the pool."""
    pool.load_models()
    for split in splits(config):
        pool.load(split)
    if (ranking := pool.ranked_by(splits(config)[0])) != pool.rank_by:
        why = f"there are too few pictures for search.rank_by: {pool.rank_by}"
        say("search", f"ranks by {MEASURES[ranking].name}: {why}")
    return pool


def _mirrored(config: Config, dataset: Dataset) -> AbstractContextManager[Mirror]:
    storage = RunFolder.of(config).search
    return tracked(config, {}, dataset.manifest.digest, lambda: read_rows(storage))


def _tell(config: Config, found: SearchResult) -> None:
    best, lowest = found.winner, min(row.score for row in found.rows)
    of_lowest = f"the lowest ({lowest:.{best.measure.digits}f})"
    tie = "" if best.score <= lowest else f", within the error of {of_lowest}, with fewer steps"
    what = f"{best.trial_id} at step {best.step}"
    over = f" over {config.search.folds} folds" if config.search.folds else ""
    say("search", f"winner: {what}, validation{over} {with_error(best)}{tie}")
    say("search", bill(config, found))


def _run(config: Config, arguments: argparse.Namespace) -> SearchResult:
    check_store(config)
    config = settled(config)
    check_networks(config.evaluate)
    check = checked(config)
    dataset = prepare(config, check=check)
    config = check().with_ladder(dataset.rows_an_epoch)
    with evaluators(config, dataset) as pool:
        return search(config, dataset, pool)


def main(given: list[str] | None = None) -> None:
    run_stage(__doc__, _run, add_budget_arguments, given=given)


if __name__ == "__main__":
    main()
