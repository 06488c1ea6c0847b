"""What a search leaves behind: a line a rung, and which of them wins.

Below `<storage>/<run>/search/`: `digest` of what the results depend on, `results.jsonl`, and `finished.json`
with the winner once every trial has ended.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cluster.storage import Storage
from ray_jobs.config import Config, EvaluateConfig
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
# With other values of these a search goes on with what it has.
EXTENDING = ("patience", "max_steps", "max_hours", "max_cost", "num_trials", "guidance_scales")
SCORES = ("fid", "fid_error", "kid", "kid_error", "fid_2", "fid_2_error")
ORIGIN = ("feature_network", "feature_network_2", "num_samples")  # of scores that compare, the same
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
    """What a search found.

    Attributes:
        measured: the measured rungs, as results.jsonl holds them.
        rows: the candidates: the same, or with `search.folds` means over the folds.
        winner: one of them, with `guidance_scale` where several were tried; with `search.folds` its
            checkpoint is that of the last training.
        computed: denoiser steps, by training.
    """

    digest: str
    measured: list[dict[str, Any]]
    rows: list[dict[str, Any]]
    winner: dict[str, Any]
    computed: dict[str, int]


def search_digest(config: Config, dataset: Dataset) -> str:
    """Identifies what the results depend on: data, model, training, search and evaluation."""
    settings = config.model_dump(mode="json", include={"search", "evaluate"})
    for field in (*EXTENDING, "device_hour_price", "max_concurrent_trials", "wait_for_scores"):
        del settings["search"][field]
    for field in (*EvaluateConfig.AFTER_SEARCH, "num_actors"):
        del settings["evaluate"][field]
    content = json.dumps([depends_on(config, dataset), settings], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def finished(config: Config, dataset: Dataset, best: dict[str, Any]) -> str:
    """What finished.json holds. With a larger budget, more trials or more patience a search goes on."""
    extent = config.search.model_dump(mode="json", include=set(EXTENDING))
    return json.dumps({"digest": search_digest(config, dataset), "extent": extent, "winner": best})


def read_rows(storage: Storage) -> list[dict[str, Any]]:
    """The lines of results.jsonl; none if there is no such file."""
    return storage.read_lines(RESULTS)


def read_result(config: Config, dataset: Dataset) -> SearchResult | None:
    """What a finished search of this configuration found; None if there was none."""
    storage = Storage.open(config.storage).child(config.name, "search")
    if not storage.exists(FINISHED):
        return None
    told = storage.read_text(FINISHED)
    best = json.loads(told)["winner"]
    return (
        result(config, dataset, read_rows(storage), best) if told == finished(config, dataset, best) else None
    )


def result(
    config: Config, dataset: Dataset, measured: list[dict[str, Any]], best: dict[str, Any]
) -> SearchResult:
    """With the digest of all that it depends on, also where it stopped and what won."""
    content = finished(config, dataset, best)
    digest = hashlib.sha256(content.encode()).hexdigest()
    computed = read_computed(Storage.open(config.storage).child(config.name, "search"))
    return SearchResult(digest, measured, candidates(config, measured), best, computed)


def candidates(config: Config, measured: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the winner is chosen from."""
    return averaged(measured, config.search.folds) if config.search.folds else measured


def choose(rows: list[dict[str, Any]], pool: EvaluatorPool) -> dict[str, Any]:
    """The row that wins. Ties are told by pairs of pictures from the same noise (`paired_difference`).

    Rows that were compared with the one of the lowest FID get `behind` and `behind_error`, by how much theirs
    is higher and the error of that, and `variance_ratio` (as in `PairedDifference`; None: infinite).
    `features` of a row: where the features of its pictures are kept, if not with its checkpoint.

    Raises:
        ValueError: rows were measured by different networks, or on different numbers of pictures.
    """
    require_comparable(rows, *ORIGIN)
    best = min(rows, key=lambda row: (row["fid"], row["step"]))
    compared = []
    for row in rows:
        # Of an earlier start, which another rung was the best of.
        for stale in ("behind", "behind_error", "variance_ratio"):
            row.pop(stale, None)
        behind, error = row["fid"] - best["fid"], 0.0
        # Of more steps it could not win a tie; and without errors only equal scores are one.
        if row["step"] < best["step"] and row.get("fid_error") is not None:
            rung, lowest = (Storage.open(each.get("features", each["checkpoint"])) for each in (row, best))
            found = pool.difference(rung, lowest, "validation")
            behind, error = found.value, found.standard_error
            ratio = found.variance_ratio if math.isfinite(found.variance_ratio) else None
            row |= {"behind": behind, "behind_error": error, "variance_ratio": ratio}
        compared.append(Candidate(behind, error, row["step"]))
    return rows[winner(compared)]


def with_error(row: dict[str, Any]) -> str:
    """A row's FID for a person."""
    return number(row["fid"], 1, row.get("fid_error"))


def spent(config: Config, rows: list[dict[str, Any]], computed: Mapping[str, int]) -> Spent:
    """What every training took: of steps all that were computed, of time what came before its last rung.

    Args:
        rows: a line a rung of a training, as results.jsonl holds them.
        computed: steps by training; they are at least those of its last rung.
    """
    last = {training_of(row): row for row in sorted(rows, key=lambda row: int(row["step"]))}
    # A member that took over another's state saved nothing.
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
    """What a search takes at most, as far as that is known beforehand, in lines for a person."""
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
    """What was spent, and what of the whole grid was not, for a person."""
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
