"""Results of a search: one line per rung, and the winner.

Files in `<storage>/<run>/search/`: `digest` of everything that the results depend on, `results.jsonl`, and
`finished.json` with the winner once every trial has ended.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from cluster.storage import Storage
from ray_jobs.config import Config, Effect
from ray_jobs.data.feeding.dataset import Dataset
from ray_jobs.evaluation.cross_validation import averaged
from ray_jobs.evaluation.pool import EvaluatorPool
from ray_jobs.metrics.ranking import Candidate, require_comparable, winner
from ray_jobs.report import Spent, TrialCost, number
from ray_jobs.run.names import training_of
from ray_jobs.training.trainer import depends_on
from ray_jobs.tuning.computed_steps import read_computed

RESULTS = "results.jsonl"
FINISHED = "finished.json"
SCORES = ("fid", "fid_error", "kid", "kid_error", "fid_2", "fid_2_error")
ORIGIN = ("feature_network", "feature_network_2", "num_samples")  # equal in scores that may be compared
FIELDS = (
    "trial_id",
    "learning_rate",
    "settings",
    "fold",
    "training",
    "parent",
    "begins_at",
    "step",
    *SCORES,
    *ORIGIN,
    "train_loss",
    "validation_loss",
    "validation_losses",
    "images_per_second",
    "seconds",
    "checkpoint",
)


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
    measured: list[dict[str, Any]]
    rows: list[dict[str, Any]]
    winner: dict[str, Any]
    computed: dict[str, int]


def search_digest(config: Config, dataset: Dataset) -> str:
    """Digest of everything that the results depend on: data, model, training, search and evaluation."""
    settings = [depends_on(config, dataset), config.affecting(Effect.SCORES)]
    content = json.dumps(settings, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def finished(config: Config, dataset: Dataset, best: dict[str, Any], priced: bool = True) -> str:
    """Content of finished.json. It changes with the budget, trials or patience, so the search continues."""
    extent = config.search.affecting(Effect.EXTENT)
    if not (priced and config.search.max_cost):
        del extent["device_hour_price"]  # without max_cost it only shows in the report
    return json.dumps({"digest": search_digest(config, dataset), "extent": extent, "winner": best})


def read_rows(storage: Storage) -> list[dict[str, Any]]:
    """Read the lines of results.jsonl; empty if the file does not exist."""
    return storage.read_lines(RESULTS)


def read_result(config: Config, dataset: Dataset) -> SearchResult | None:
    """Read the result of a finished search of this configuration; None if there is none."""
    storage = Storage.open(config.storage).child(config.name, "search")
    if not storage.exists(FINISHED):
        return None
    told = storage.read_text(FINISHED)
    best = json.loads(told)["winner"]
    # Earlier releases left the price out.
    if told not in (finished(config, dataset, best, priced) for priced in (True, False)):
        return None
    found = result(config, dataset, read_rows(storage), best)
    return replace(found, digest=hashlib.sha256(told.encode()).hexdigest())


def result(
    config: Config, dataset: Dataset, measured: list[dict[str, Any]], best: dict[str, Any]
) -> SearchResult:
    """Build a SearchResult; its digest also covers the search's extent and winner."""
    content = finished(config, dataset, best)
    digest = hashlib.sha256(content.encode()).hexdigest()
    computed = read_computed(Storage.open(config.storage).child(config.name, "search"))
    return SearchResult(digest, measured, candidates(config, measured), best, computed)


def candidates(config: Config, measured: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows that the winner is chosen from."""
    return averaged(measured, config.search.folds) if config.search.folds else measured


def choose(rows: list[dict[str, Any]], pool: EvaluatorPool) -> dict[str, Any]:
    """Return the winning row; ties are decided on pairs of pictures with equal noise (`paired_difference`).

    Rows compared with the lowest FID get `behind`, the difference of their FIDs, `behind_error`, its error,
    and `variance_ratio` (as in `PairedDifference`; None: infinite). A row's `features`, if present, is the
    folder of its pictures' features; otherwise they are stored with its checkpoint.

    Raises:
        ValueError: rows were measured with different networks or numbers of pictures.
    """
    require_comparable(rows, *ORIGIN)
    best = min(rows, key=lambda row: (row["fid"], row["step"]))
    compared = []
    for row in rows:
        # Values of an earlier start, which had another best rung.
        for stale in ("behind", "behind_error", "variance_ratio"):
            row.pop(stale, None)
        behind, error = row["fid"] - best["fid"], 0.0
        # A row with more steps cannot win a tie, and without errors only equal scores tie.
        if row["step"] < best["step"] and row.get("fid_error") is not None:
            rung, lowest = (Storage.open(each.get("features", each["checkpoint"])) for each in (row, best))
            found = pool.difference(rung, lowest, "validation")
            behind, error = found.value, found.standard_error
            ratio = found.variance_ratio if math.isfinite(found.variance_ratio) else None
            row |= {"behind": behind, "behind_error": error, "variance_ratio": ratio}
        compared.append(Candidate(behind, error, row["step"]))
    return rows[winner(compared)]


def with_error(row: dict[str, Any]) -> str:
    """Format a row's FID with its error for display."""
    return number(row["fid"], 1, row.get("fid_error"))


def spent(config: Config, rows: list[dict[str, Any]], computed: Mapping[str, int]) -> Spent:
    """Sum up the cost of every training: all computed steps, and the time up to its last rung.

    Args:
        rows: one row per rung of a training, as in results.jsonl.
        computed: steps by training; at least the steps of its last rung are counted.
    """
    last = {training_of(row): row for row in sorted(rows, key=lambda row: int(row["step"]))}
    # In population based training no trial is stopped early, so none saves steps.
    replaced = config.search.scheduler == "population"
    costs = []
    for name, row in last.items():
        measured = row["step"] - row.get("begins_at", 0)
        steps = max(measured, computed.get(name, 0))
        costs.append(
            TrialCost(
                trial_id=name,
                steps=steps,
                measured_steps=measured,
                seconds=row["seconds"],
                device_hours=row["seconds"] / 3600 * config.train.min_workers,
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
