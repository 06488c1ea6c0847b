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
from ray_jobs.report import Spent, TrialCost
from ray_jobs.train import depends_on

RESULTS = "results.jsonl"
FINISHED = "finished.json"
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
    content = json.dumps([depends_on(config, dataset), settings], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def read_rows(storage: Storage) -> list[dict[str, Any]]:
    """The lines of results.jsonl; none if there is no such file."""
    if not storage.exists(RESULTS):
        return []
    return [json.loads(line) for line in storage.read_text(RESULTS).splitlines()]


def write_rows(storage: Storage, rows: list[dict[str, Any]]) -> None:
    """results.jsonl anew, as a whole."""
    storage.write_text(RESULTS, "".join(json.dumps(row) + "\n" for row in rows))


def read_result(config: Config, dataset: Dataset) -> SearchResult | None:
    """What a finished search of this configuration found; None if there was none."""
    storage = Storage.open(config.storage).child(config.name, "search")
    digest = search_digest(config, dataset)
    if not storage.exists(FINISHED):
        return None
    finished = json.loads(storage.read_text(FINISHED))
    if finished["digest"] != digest:
        return None
    rows = read_rows(storage)
    [best] = [row for row in rows if (row["trial_id"], row["step"]) == tuple(finished["winner"])]
    return SearchResult(digest, rows, best)


def choose(rows: list[dict[str, Any]], pool: EvaluatorPool) -> dict[str, Any]:
    """The row that wins. Ties are told by pairs of pictures from the same noise (`paired_difference`).

    Rows that were compared with the one of the lowest FID get `behind` and `behind_error`: by how much theirs
    is higher, and the error of that.
    """
    best = min(rows, key=lambda row: (row["fid"], row["step"]))
    candidates = []
    for row in rows:
        behind, error = row["fid"] - best["fid"], 0.0
        # Of more steps it could not win a tie; and without errors only equal scores are one.
        if row["step"] < best["step"] and row.get("fid_error") is not None:
            rung, lowest = (Storage.open(each["checkpoint"]) for each in (row, best))
            behind, error = pool.difference(rung, lowest, "validation")
            row |= {"behind": behind, "behind_error": error}
        candidates.append(Candidate(behind, error, row["step"]))
    return rows[winner(candidates)]


def with_error(row: dict[str, Any]) -> str:
    """A row's FID for a person."""
    error = row.get("fid_error")
    return f"{row['fid']:.1f}" + ("" if error is None else f" ± {error:.1f}")


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
