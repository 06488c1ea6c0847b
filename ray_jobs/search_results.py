"""What a search leaves behind: a line a rung, and which of them wins.

Below `<storage>/<run>/search/`: `digest` of what the results depend on, `results.jsonl`, and `finished.json`
with the winner once every trial has ended.
"""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from cluster.storage import Storage
from ray_jobs.config import Config
from ray_jobs.data.dataset import Dataset
from ray_jobs.evaluate import EvaluatorPool
from ray_jobs.metrics.ranking import Candidate, winner
from ray_jobs.report import Spent, TrialCost, number
from ray_jobs.train import depends_on

RESULTS = "results.jsonl"
FINISHED = "finished.json"
STOPPING = ("patience", "max_steps", "max_hours", "max_cost")  # settings that only end a search earlier
SCORES = ("fid", "fid_error", "kid", "kid_error", "fid_2", "fid_2_error", "feature_network_2")
FIELDS = (
    "trial_id",
    "learning_rate",
    "step",
    *SCORES,
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
        rows: the measured rungs.
        winner: one of them.
    """

    digest: str
    rows: list[dict[str, Any]]
    winner: dict[str, Any]


def search_digest(config: Config, dataset: Dataset) -> str:
    """Identifies what the results depend on: data, model, training, search and evaluation."""
    settings = config.model_dump(mode="json", include={"search", "evaluate"})
    for field in (*STOPPING, "device_hour_price", "max_concurrent_trials"):
        del settings["search"][field]
    content = json.dumps([depends_on(config, dataset), settings], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def finished(config: Config, dataset: Dataset, best: dict[str, Any]) -> str:
    """What finished.json holds. With a larger budget or more patience a search goes on."""
    stopping = config.search.model_dump(mode="json", include=set(STOPPING))
    chosen = [best["trial_id"], best["step"]]
    return json.dumps({"digest": search_digest(config, dataset), "stopping": stopping, "winner": chosen})


def read_rows(storage: Storage) -> list[dict[str, Any]]:
    """The lines of results.jsonl; none if there is no such file."""
    return storage.read_lines(RESULTS)


def read_result(config: Config, dataset: Dataset) -> SearchResult | None:
    """What a finished search of this configuration found; None if there was none."""
    storage = Storage.open(config.storage).child(config.name, "search")
    if not storage.exists(FINISHED):
        return None
    told, rows = storage.read_text(FINISHED), read_rows(storage)
    [best] = [row for row in rows if [row["trial_id"], row["step"]] == json.loads(told)["winner"]]
    return result(config, dataset, rows, best) if told == finished(config, dataset, best) else None


def result(
    config: Config, dataset: Dataset, rows: list[dict[str, Any]], best: dict[str, Any]
) -> SearchResult:
    """With the digest of all that it depends on, also where it stopped and what won."""
    content = finished(config, dataset, best)
    return SearchResult(hashlib.sha256(content.encode()).hexdigest(), rows, best)


def choose(rows: list[dict[str, Any]], pool: EvaluatorPool) -> dict[str, Any]:
    """The row that wins. Ties are told by pairs of pictures from the same noise (`paired_difference`).

    Rows that were compared with the one of the lowest FID get `behind` and `behind_error`: by how much theirs
    is higher, and the error of that.
    """
    best = min(rows, key=lambda row: (row["fid"], row["step"]))
    candidates = []
    for row in rows:
        for stale in ("behind", "behind_error"):  # of an earlier start, which another rung was the best of
            row.pop(stale, None)
        behind, error = row["fid"] - best["fid"], 0.0
        # Of more steps it could not win a tie; and without errors only equal scores are one.
        if row["step"] < best["step"] and row.get("fid_error") is not None:
            rung, lowest = (Storage.open(each["checkpoint"]) for each in (row, best))
            found = pool.difference(rung, lowest, "validation")
            behind, error = found.value, found.standard_error
            row |= {"behind": behind, "behind_error": error}
        candidates.append(Candidate(behind, error, row["step"]))
    return rows[winner(candidates)]


def with_error(row: dict[str, Any]) -> str:
    """A row's FID for a person."""
    return number(row["fid"], 1, row.get("fid_error"))


def spent(config: Config, rows: list[dict[str, Any]]) -> Spent:
    """What every trial took up to its last rung, since it was last started."""
    last = {row["trial_id"]: row for row in sorted(rows, key=lambda row: int(row["step"]))}
    costs = [
        TrialCost(
            trial_id=name,
            learning_rate=row["learning_rate"],
            steps=row["step"],
            seconds=row["seconds"],
            device_hours=row["seconds"] / 3600 * config.train.min_workers,
            saved_steps=config.search.ladder[-1] - row["step"],
        )
        for name, row in last.items()
    ]
    return Spent(costs, config.search.device_hour_price)


def bill(config: Config, rows: list[dict[str, Any]]) -> str:
    """What was spent, and what of the whole grid was not, for a person."""
    found = spent(config, rows)
    steps, hours = (sum(getattr(trial, name) for trial in found.trials) for name in ("steps", "device_hours"))
    whole = len(config.search.learning_rates) * config.search.ladder[-1]
    cost = f", at {found.price:g} an hour {hours * found.price:.2f}" if found.price else ""
    return f"spent {steps:,} of {whole:,} steps, {hours:.2f} hours of workers{cost}"
