"""Results of a search: one line per rung, and the winner.

Files in `<storage>/<run>/search/`: `digest` of everything that the results depend on, `results.jsonl`, and
`finished.json` with the winner once every trial has ended.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

from cluster.storage import Storage
from ray_jobs.config import Config, Effect
from ray_jobs.console import say
from ray_jobs.data.feeding.dataset import Dataset
from ray_jobs.evaluation.cross_validation import ORIGIN, averaged
from ray_jobs.evaluation.pool import EvaluatorPool
from ray_jobs.metrics.ranking import Candidate, require_comparable, winner
from ray_jobs.metrics.votes import DRIFT
from ray_jobs.report import Spent, TrialCost, number
from ray_jobs.run.folder import RunFolder
from ray_jobs.run.records import (
    BESIDE,
    CONTROL,
    DISAGREEMENT,
    FID,
    SUBJECT,
    VOTES,
    RungRow,
    read_rows,
    worker_hours,
)
from ray_jobs.run.split import VALIDATION
from ray_jobs.training.trainer import began_with
from ray_jobs.tuning.computed_steps import read_computed

FINISHED = "finished.json"
TUNE = "tune"  # folder of Ray Tune, which stays where trials were interrupted
BEGINNING = "beginning"  # folder of the features of what training began from
COMPARISON = ("behind", "behind_error", "variance_ratio")


@dataclass(frozen=True)
class SearchResult:
    """Result of a search.

    Attributes:
        measured: rows of the measured rungs, as in results.jsonl.
        rows: the candidates: the same rows, or with `search.folds` the means over the folds.
        winner: winning row, with `guidance_scale` if several were tried; with `search.folds` its checkpoint
            is the refit's.
        computed: denoiser steps, by training.
    """

    digest: str
    measured: list[RungRow]
    rows: list[RungRow]
    winner: RungRow
    computed: dict[str, int]


def search_digest(config: Config, dataset: Dataset, as_before: bool = False) -> str:
    """Digest of everything that the results depend on: data, model, training, search and evaluation.

    Args:
        as_before: as earlier releases computed it.

    Raises:
        ValueError: the file of `model.adapter` or `model.assistant` is missing; their content is part of it.
    """
    settings = [began_with(config, dataset, None), config.affecting(Effect.SCORES, as_before=as_before)]
    if config.search.rank_by == SUBJECT:
        evaluate = config.evaluate
        asked = [evaluate.clip_revision, *evaluate.prompts] if evaluate.clip else []
        settings.append({"subject": [evaluate.subject_samples, evaluate.clip, *asked]})
    content = json.dumps(settings, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def finished(config: Config, dataset: Dataset, best: RungRow, priced: bool = True) -> str:
    """Content of finished.json. It changes with the budget, trials or patience, so the search continues."""
    extent = config.search.affecting(Effect.EXTENT)
    if not (priced and config.search.max_cost):
        del extent["device_hour_price"]  # without max_cost it only shows in the report
    return json.dumps({"digest": search_digest(config, dataset), "extent": extent, "winner": best.fields()})


def search_digests(config: Config, dataset: Dataset) -> list[str]:
    """Return the search's digest, and the one by which earlier releases recognised the same search."""
    return [search_digest(config, dataset, as_before) for as_before in (False, True)]


def read_result(config: Config, dataset: Dataset) -> SearchResult | None:
    """Read the result of a finished search of this configuration; None if there is none."""
    storage = RunFolder.of(config).search
    if not storage.exists(FINISHED):
        return None
    content = storage.read_text(FINISHED)
    told = json.loads(content)
    best = RungRow.parse(told["winner"], f"{storage.uri}/{FINISHED}")
    # Earlier releases left the price out.
    extents = [json.loads(finished(config, dataset, best, priced))["extent"] for priced in (True, False)]
    if told["digest"] not in search_digests(config, dataset) or told["extent"] not in extents:
        return None
    return result(config, content, read_rows(storage), best)


def result(config: Config, content: str, measured: list[RungRow], best: RungRow) -> SearchResult:
    """Build a SearchResult from the content of finished.json, which its digest covers."""
    digest = result_digest(content)
    computed = read_computed(RunFolder.of(config).search)
    return SearchResult(digest, measured, candidates(config, measured), best, computed)


def result_digest(content: str) -> str:
    """Return the digest of a search's result, by which winner.json names it, from finished.json."""
    return hashlib.sha256(content.encode()).hexdigest()


def candidates(config: Config, measured: list[RungRow]) -> list[RungRow]:
    """Rows that the winner is chosen from."""
    return averaged(measured, config.search.folds) if config.search.folds else measured


def choose(rows: list[RungRow], pool: EvaluatorPool) -> tuple[RungRow, list[RungRow]]:
    """Return the winning row, and all rows with what they were compared by.

    Ties are decided on pairs of pictures with equal noise (`paired_difference`). Rows compared with the
    lowest score get `behind`, `behind_error` and `variance_ratio`.

    Raises:
        ValueError: rows were measured with different networks or numbers of pictures.
    """
    require_comparable([row.fields() for row in rows], *ORIGIN)
    rows = [row.without(*COMPARISON) for row in rows]  # of an earlier start, which had another best rung
    standing = _within_drift(rows, pool)
    best = min((rows[place] for place in standing), key=lambda row: (row.score, row.step))
    for place in standing:
        row = rows[place]
        # A row with more steps cannot win a tie, and without errors only equal scores tie.
        if row.step < best.step and row.score_error is not None:
            rung, lowest = map(_drawn, (row, best))
            found = pool.difference(rung, lowest, VALIDATION, measure=row.ranked_by)
            ratio = found.variance_ratio if math.isfinite(found.variance_ratio) else None
            compared = dict(zip(COMPARISON, (found.value, found.standard_error, ratio), strict=True))
            rows[place] = row | compared
    ranked = [
        Candidate(
            row.score - best.score if row.behind is None else row.behind, row.behind_error or 0.0, row.step
        )
        for row in (rows[place] for place in standing)
    ]
    return rows[standing[winner(ranked)]], rows


def _drawn(row: RungRow) -> Storage:
    """Return the folder with the features of a candidate's own pictures."""
    return Storage.open(row.features or row.checkpoint)


def _within_drift(rows: list[RungRow], pool: EvaluatorPool) -> list[int]:
    """Return the places of the rows that may win.

    Of a search by votes these are rows whose FID is not worse than that of what training began from, by more
    than `DRIFT` times the error of the difference in pairs of pictures; or all, if there is none. Votes say
    nothing of what else is lost.
    """
    places = list(range(len(rows)))
    if rows[0].ranked_by != VOTES:
        return places
    beginning = RunFolder.of(pool.config).search.child(BEGINNING)
    before = pool.score(None, VALIDATION, beginning).fid

    def drifted(row: RungRow) -> bool:
        if row.fid_error is None:  # as with evaluate.bootstrap: 0; that of votes is always known
            return row.fid > before.value
        apart = pool.difference(_drawn(row), beginning, VALIDATION)
        return apart.value > DRIFT * apart.standard_error

    kept = [place for place in places if not drifted(rows[place])]
    if len(kept) < len(places):
        begun = number(before.value, 1, before.standard_error)
        say("search", f"{len(places) - len(kept)} of {len(places)} rungs have a worse FID than {begun}")
    return kept or places


def with_error(row: RungRow) -> str:
    """Format a row's ranking score with its error for display."""
    name, digits = row.measure
    told = f"{name} {number(row.score, digits, row.score_error)}"
    beside = f"FID {row.fid:.1f}"
    if row.ranked_by == CONTROL and row.disagreement is not None:
        distance = "" if row.corrected_fid is None else f", corrected {row.corrected_fid:.1f}"
        beside += f"{distance}; disagreement {row.disagreement:.{BESIDE[DISAGREEMENT].digits}f}"
    return told if row.ranked_by == FID else f"{told} ({beside})"


def spent(config: Config, rows: list[RungRow], computed: Mapping[str, int]) -> Spent:
    """Sum up the cost of every training: all computed steps, and the time up to its last rung.

    Args:
        rows: one row per rung of a training, as in results.jsonl.
        computed: steps by training; at least the steps of its last rung are counted.
    """
    last = {row.training_name: row for row in sorted(rows, key=lambda row: row.step)}
    hours = worker_hours(rows, config.train.min_workers)
    # In population based training no trial is stopped early, so none saves steps.
    replaced = config.search.scheduler == "population"
    costs = []
    for name, row in last.items():
        measured = row.step - row.begins_at
        steps = max(measured, computed.get(name, 0))
        costs.append(
            TrialCost(
                trial_id=name,
                steps=steps,
                measured_steps=measured,
                seconds=row.seconds,
                device_hours=hours[name],
                saved_steps=0 if replaced else max(0, config.search.ladder[-1] - steps),
            )
        )
    other = sum(steps for name, steps in computed.items() if name not in last)
    return Spent(costs, config.search.device_hour_price, other)


def at_most(config: Config) -> list[str]:
    """Describe the upper bounds of a search's cost that are known beforehand, as lines for display."""
    search, evaluate = config.search, config.evaluate
    most, planned, last = search.most_steps, search.planned_steps, search.ladder[-1]
    lines = [f"at most {most // last} x {last:,} = {most:,} steps"]
    if planned < most:
        lines = [f"at most {planned:,} steps, of {most:,} where no trial is stopped"]
    if search.max_steps and search.max_steps < planned:
        lines.append(f"it ends at the rung where {search.max_steps:,} steps are computed")
    price = search.device_hour_price
    bounds = [search.max_hours, search.max_cost / price if search.max_cost and price else None]
    if known := [hours for hours in bounds if hours]:
        cost = f", which cost {min(known) * price:.2f}" if price else ""
        lines.append(f"it ends at the rung where {min(known):.2f} hours of workers are spent{cost}")
    elif price:
        lines.append(
            f"at {price:g} an hour of a worker: what it comes to python -m cluster.plan tells from the speed"
        )
    if search.folds:
        lines.append(f"beyond that up to {last:,} steps, of the winner on all folds")
    if scales := [scale for scale in search.guidance_scales if scale != evaluate.guidance_scale]:
        lines.append(f"and {search.grid_size * len(scales)} scores, of each trial's best rung at {scales}")
    if evaluate.use_gpu and (price or known):
        lines.append(f"hours and cost are without those of the {evaluate.num_actors} evaluators' GPUs")
    return lines


def bill(config: Config, found: SearchResult) -> str:
    """Summarise the cost of a search against that of the whole grid, for display."""
    cost = spent(config, found.measured, found.computed)
    steps, measured, hours = (
        sum(getattr(trial, name) for trial in cost.trials)
        for name in ("steps", "measured_steps", "device_hours")
    )
    price = f", at {cost.price:g} an hour {hours * cost.price:.2f}" if cost.price else ""
    other = f", {cost.other_steps:,} of trainings without a measured rung" if cost.other_steps else ""
    return (
        f"computed {steps:,} of {config.search.most_steps:,} steps, {measured:,} of them up to a measured "
        f"rung{other}; {hours:.2f} hours of workers{price}"
    )
