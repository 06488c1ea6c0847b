"""Cross-validation: each fold trains what the folds before it have not stopped; candidates are ranked by the
mean over all folds.

Folds differ in how hard their pictures are, so candidates are compared fold by fold: what all have in common
cancels, and the standard error is that of the mean difference (Dietterich, 1998, on paired tests).
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
    """Whose pictures judge the candidates: the validation split, or one fold after the other."""
    return [f"fold-{fold}" for fold in range(config.search.folds)] or ["validation"]


def unseen_by(training: str) -> str | None:
    """The split that a training never saw, by the name of its folder: validation, or the fold that it left
    out. None: the last one, which all of training and validation went into."""
    if fold := re.search(r"_(fold-\d+)$", training):
        return fold[1]
    return None if training.endswith("_refit") else "validation"


def held_out(config: Config, split: str) -> str:
    """Whose pictures the weights that a split judges never saw, to say how near unseen pictures come to those
    that they were trained on: the split's own; for the test split the validation split's, unless a last
    training has taken those too."""
    return "validation" if split == "test" and not config.search.folds else split


def trained_on(config: Config, dataset: Dataset, split: str) -> Dataset:
    """The set whose training split the weights that a split judges were trained on."""
    return dataset.together() if split == "test" and config.search.folds else dataset.judged_by(split)[0]


def standing(rows: list[Row], folds: int) -> dict[str, int]:
    """The trials that every fold up to now has measured, and the last step that all of them reached.

    Args:
        folds: how many of them are done.
    """
    reached: dict[str, list[int]] = {}
    for name in {row["trial_id"] for row in rows}:
        for fold in range(folds):
            steps = [row["step"] for row in rows if (row["trial_id"], row["fold"]) == (name, fold)]
            reached.setdefault(name, []).append(max(steps, default=0))
    return {name: min(steps) for name, steps in reached.items() if min(steps)}


def complete(rows: list[Row], folds: int) -> dict[tuple[str, int], list[Row]]:
    """The candidates that all folds have measured, by trial and step: their rows in the folds' order."""
    found: dict[tuple[str, int], dict[int, Row]] = {}
    for row in rows:
        found.setdefault((row["trial_id"], row["step"]), {})[row["fold"]] = row
    return {
        key: [of_fold[fold] for fold in range(folds)]
        for key, of_fold in sorted(found.items())
        if len(of_fold) == folds
    }


def averaged(rows: list[Row], folds: int) -> list[Row]:
    """A row a candidate: means over the folds with their standard errors, `folds` the FID of each, and
    `num_samples` the pictures of all.

    Raises:
        ValueError: folds were measured by different networks.
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
    """The row of `averaged` that wins; one of fewer steps wins over the lowest if the folds do not tell them
    apart. Those that were compared get `behind` and `behind_error`.

    Raises:
        ValueError: they were measured by different networks, or on different numbers of pictures.
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
    """Of their mean."""
    return stdev(values) / math.sqrt(len(values))
