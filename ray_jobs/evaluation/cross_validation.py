"""Cross-validation: each fold trains the trials that no earlier fold stopped; candidates are ranked by the
mean over all folds.

Some folds have harder pictures than others, so candidates are compared fold by fold. The difficulty that all
candidates share cancels, and the standard error is that of the mean difference (Dietterich, 1998, on paired
tests).
"""

import math
import re
from statistics import fmean, stdev
from typing import Any

from ray_jobs.config import Config
from ray_jobs.data.feeding.dataset import Dataset
from ray_jobs.metrics.ranking import Candidate, require_comparable, winner

Row = dict[str, Any]
MEANS = ("fid", "kid", "fid_2", "train_loss", "validation_loss", "images_per_second")


def splits(config: Config) -> list[str]:
    """Names of the splits that candidates are scored on: the validation split, or each fold in turn."""
    return [f"fold-{fold}" for fold in range(config.search.folds)] or ["validation"]


def unseen_by(training: str) -> str | None:
    """Return the split that a training did not use, given its folder name: validation, or its held-out fold.

    None: the refit, which trains on the training and validation splits together.
    """
    if fold := re.search(r"_(fold-\d+)$", training):
        return fold[1]
    return None if training.endswith("_refit") else "validation"


def held_out(config: Config, split: str) -> str:
    """Return the split whose pictures serve as the held-out reference for near copies.

    They show how near pictures that were not trained on come to the training pictures. This is the evaluated
    split itself; for the test split it is validation, unless the refit trained on validation too.
    """
    return "validation" if split == "test" and not config.search.folds else split


def trained_on(config: Config, dataset: Dataset, split: str) -> Dataset:
    """Return the dataset whose training split produced the weights that `split` evaluates."""
    return dataset.together() if split == "test" and config.search.folds else dataset.judged_by(split)[0]


def standing(rows: list[Row], folds: int) -> dict[str, int]:
    """Return the trials measured in every completed fold, with the last step reached in all of them.

    Args:
        folds: number of completed folds.
    """
    reached: dict[str, list[int]] = {}
    for name in {row["trial_id"] for row in rows}:
        for fold in range(folds):
            steps = [row["step"] for row in rows if (row["trial_id"], row["fold"]) == (name, fold)]
            reached.setdefault(name, []).append(max(steps, default=0))
    return {name: min(steps) for name, steps in reached.items() if min(steps)}


def complete(rows: list[Row], folds: int) -> dict[tuple[str, int], list[Row]]:
    """Group the candidates measured in all folds by trial and step; rows are in fold order."""
    found: dict[tuple[str, int], dict[int, Row]] = {}
    for row in rows:
        found.setdefault((row["trial_id"], row["step"]), {})[row["fold"]] = row
    return {
        key: [of_fold[fold] for fold in range(folds)]
        for key, of_fold in sorted(found.items())
        if len(of_fold) == folds
    }


def averaged(rows: list[Row], folds: int) -> list[Row]:
    """Average each candidate's rows over the folds, with standard errors.

    Each returned row's `folds` lists the FID per fold; `num_samples` counts the pictures of all folds.

    Raises:
        ValueError: the folds were measured with different networks.
    """
    found = []
    for of_fold in complete(rows, folds).values():
        require_comparable(of_fold, "feature_network", "feature_network_2")
        row = {name: value for name, value in of_fold[0].items() if name not in ("fold", "training")}
        for name in MEANS:
            values = [each[name] for each in of_fold if each.get(name) is not None]
            if len(values) == folds:
                row[name] = fmean(values)
                if f"{name}_error" in row:
                    row[f"{name}_error"] = standard_error(values)
        if all("num_samples" in each for each in of_fold):
            row["num_samples"] = sum(each["num_samples"] for each in of_fold)
        row["seconds"] = sum(each["seconds"] for each in of_fold)
        row["folds"] = [each["fid"] for each in of_fold]
        found.append(row)
    return found


def choose_over_folds(rows: list[Row]) -> Row:
    """Return the winning row of `averaged`.

    A candidate with fewer steps wins over the lowest FID if their difference over the folds is within its
    standard error. Rows compared with the lowest get `behind` and `behind_error`.

    Raises:
        ValueError: rows were measured with different networks or numbers of pictures.
    """
    require_comparable(rows, "feature_network", "feature_network_2", "num_samples")
    best = min(rows, key=lambda row: (row["fid"], row["step"]))
    candidates = []
    for row in rows:
        behind = [mine - lowest for mine, lowest in zip(row["folds"], best["folds"], strict=True)]
        error = standard_error(behind) if row["step"] < best["step"] else 0.0
        if row["step"] < best["step"]:
            row |= {"behind": fmean(behind), "behind_error": error}
        candidates.append(Candidate(fmean(behind), error, row["step"]))
    return rows[winner(candidates)]


def standard_error(values: list[float]) -> float:
    """Standard error of the mean of `values`."""
    return stdev(values) / math.sqrt(len(values))
