"""What a search leaves behind: a line a rung, and which of them wins.

Below `<storage>/<run>/search/`: `digest` of what the results depend on, `results.jsonl`, and `finished.json`
with the winner once every trial has ended.
"""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from cluster.storage import Storage
from ray_jobs.config import Config, EvaluateConfig
from ray_jobs.data.dataset import Dataset
from ray_jobs.evaluate import EvaluatorPool
from ray_jobs.folds import averaged
from ray_jobs.metrics.ranking import Candidate, require_comparable, winner
from ray_jobs.report import Spent, TrialCost, number
from ray_jobs.space import training_of
from ray_jobs.train import depends_on

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
    """

    digest: str
    measured: list[dict[str, Any]]
    rows: list[dict[str, Any]]
    winner: dict[str, Any]


def search_digest(config: Config, dataset: Dataset) -> str:
    """Identifies what the results depend on: data, model, training, search and evaluation."""
    settings = config.model_dump(mode="json", include={"search", "evaluate"})
    for field in (*EXTENDING, "device_hour_price", "max_concurrent_trials"):
        del settings["search"][field]
    for field in EvaluateConfig.AFTER_SEARCH:
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
    return SearchResult(digest, measured, candidates(config, measured), best)


def candidates(config: Config, measured: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the winner is chosen from."""
    return averaged(measured, config.search.folds) if config.search.folds else measured


def choose(rows: list[dict[str, Any]], pool: EvaluatorPool) -> dict[str, Any]:
    """The row that wins. Ties are told by pairs of pictures from the same noise (`paired_difference`).

    Rows that were compared with the one of the lowest FID get `behind` and `behind_error`: by how much theirs
    is higher, and the error of that. `features` of a row: where the features of its pictures are kept, if not
    with its checkpoint.

    Raises:
        ValueError: rows were measured by different networks, or on different numbers of pictures.
    """
    require_comparable(rows, *ORIGIN)
    best = min(rows, key=lambda row: (row["fid"], row["step"]))
    compared = []
    for row in rows:
        for stale in ("behind", "behind_error"):  # of an earlier start, which another rung was the best of
            row.pop(stale, None)
        behind, error = row["fid"] - best["fid"], 0.0
        # Of more steps it could not win a tie; and without errors only equal scores are one.
        if row["step"] < best["step"] and row.get("fid_error") is not None:
            rung, lowest = (Storage.open(each.get("features", each["checkpoint"])) for each in (row, best))
            found = pool.difference(rung, lowest, "validation")
            behind, error = found.value, found.standard_error
            row |= {"behind": behind, "behind_error": error}
        compared.append(Candidate(behind, error, row["step"]))
    return rows[winner(compared)]


def with_error(row: dict[str, Any]) -> str:
    """A row's FID for a person."""
    return number(row["fid"], 1, row.get("fid_error"))


def spent(config: Config, rows: list[dict[str, Any]]) -> Spent:
    """What every training took up to its last rung.

    Args:
        rows: a line a rung of a training, as results.jsonl holds them.
    """
    last = {training_of(row): row for row in sorted(rows, key=lambda row: int(row["step"]))}
    # A member that took over another's state saved nothing.
    replaced = config.search.scheduler == "population"
    costs = [
        TrialCost(
            trial_id=name,
            learning_rate=row["learning_rate"],
            steps=row["step"] - row.get("begins_at", 0),
            seconds=row["seconds"],
            device_hours=row["seconds"] / 3600 * config.train.min_workers,
            saved_steps=0 if replaced else config.search.ladder[-1] - row["step"],
        )
        for name, row in last.items()
    ]
    return Spent(costs, config.search.device_hour_price)


def bill(config: Config, rows: list[dict[str, Any]]) -> str:
    """What was spent, and what of the whole grid was not, for a person."""
    found = spent(config, rows)
    steps, hours = (sum(getattr(trial, name) for trial in found.trials) for name in ("steps", "device_hours"))
    whole = config.search.most_steps
    cost = f", at {found.price:g} an hour {hours * found.price:.2f}" if found.price else ""
    return f"spent {steps:,} of {whole:,} steps, {hours:.2f} hours of workers{cost}"
