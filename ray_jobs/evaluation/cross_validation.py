"""Cross-validation: each fold trains the trials that no earlier fold stopped; candidates are ranked by the
mean over all folds.

Some folds have harder pictures than others, so candidates are compared fold by fold. The difficulty that all
candidates share cancels, and the standard error is that of the mean difference (Dietterich, 1998, on paired
tests).
"""

import math
from statistics import fmean, stdev

from ray_jobs.config import Config
from ray_jobs.data.feeding.dataset import Dataset
from ray_jobs.metrics.ranking import Candidate, require_comparable, winner
from ray_jobs.run.records import CONTROL, DISAGREEMENT, PREFERENCE, SUBJECT, SUBJECT_PARTS, TARGET, RungRow
from ray_jobs.run.split import TEST, VALIDATION, Split

ORIGIN = (
    "ranked_by",
    "feature_network",
    "feature_network_2",
    "subject_network",
    "preference_model",
    "num_samples",
)
"""Fields that are equal in scores that may be compared."""
MEANS = (
    "fid",
    "corrected_fid",
    "fid_means",
    "spread",
    "kid",
    "mind",
    PREFERENCE,
    TARGET,
    "outside",
    CONTROL,
    DISAGREEMENT,
    SUBJECT,
    *SUBJECT_PARTS,
    "fid_2",
    "train_loss",
    "validation_loss",
    "images_per_second",
)


def splits(config: Config) -> list[Split]:
    """Splits that candidates are scored on: the validation split, or each fold in turn."""
    return [Split.of_fold(fold) for fold in range(config.search.folds)] or [VALIDATION]


def held_out(config: Config, split: Split) -> Split:
    """Return the split whose pictures serve as the held-out reference for near copies.

    They show how near pictures that were not trained on come to the training pictures. This is the evaluated
    split itself; for the test split it is validation, unless the refit trained on validation too.
    """
    return VALIDATION if split == TEST and not config.search.folds else split


def trained_on(config: Config, dataset: Dataset, split: Split) -> Dataset:
    """Return the dataset whose training split produced the weights that `split` evaluates."""
    return dataset.together() if split == TEST and config.search.folds else dataset.judged_by(split)


def standing(rows: list[RungRow], folds: int) -> dict[str, int]:
    """Return the trials measured in every completed fold, with the last step reached in all of them.

    Args:
        folds: number of completed folds.
    """
    reached: dict[str, list[int]] = {}
    for name in {row.trial_id for row in rows}:
        for fold in range(folds):
            steps = [row.step for row in rows if (row.trial_id, row.fold) == (name, fold)]
            reached.setdefault(name, []).append(max(steps, default=0))
    return {name: min(steps) for name, steps in reached.items() if min(steps)}


def complete(rows: list[RungRow], folds: int) -> list[list[RungRow]]:
    """Group the rows of candidates measured in all folds by candidate; rows are in fold order."""
    found: dict[tuple[str, int], dict[int | None, RungRow]] = {}
    for row in rows:
        found.setdefault(row.place, {})[row.fold] = row
    return [
        [of_fold[fold] for fold in range(folds)]
        for _, of_fold in sorted(found.items())
        if len(of_fold) == folds
    ]


def averaged(rows: list[RungRow], folds: int) -> list[RungRow]:
    """Average each candidate's rows over the folds, with standard errors.

    Each returned row's `folds` lists the ranking score per fold; `num_samples` counts all folds' pictures.

    Raises:
        ValueError: the folds were measured with different networks.
    """
    found = []
    for of_fold in complete(rows, folds):
        each_given = [row.fields() for row in of_fold]
        require_comparable(each_given, *ORIGIN[:-1])
        mean = dict(each_given[0])
        for name in MEANS:
            values = [given[name] for given in each_given if given.get(name) is not None]
            if len(values) == folds:
                mean[name] = fmean(values)
                if f"{name}_error" in mean:
                    mean[f"{name}_error"] = standard_error(values)
        counts = [row.num_samples for row in of_fold if row.num_samples is not None]
        if len(counts) == folds:
            mean["num_samples"] = sum(counts)
        mean["seconds"] = sum(row.seconds for row in of_fold)
        mean["folds"] = [row.score for row in of_fold]
        found.append(RungRow.model_validate(mean).without("fold", "training"))
    return found


def choose_over_folds(rows: list[RungRow]) -> RungRow:
    """Return the winning row of `averaged`.

    A candidate with fewer steps wins over the lowest score if their difference over the folds is within its
    standard error; it then has `behind` and `behind_error`.

    Raises:
        ValueError: rows were measured with different networks or numbers of pictures.
    """
    require_comparable([row.fields() for row in rows], *ORIGIN)
    best = min(rows, key=lambda row: (row.score, row.step))
    candidates, compared = [], []
    for row in rows:
        behind = [mine - lowest for mine, lowest in zip(row.folds, best.folds, strict=True)]
        error = standard_error(behind) if row.step < best.step else 0.0
        candidates.append(Candidate(fmean(behind), error, row.step))
        told = {"behind": fmean(behind), "behind_error": error}
        compared.append(row | told if row.step < best.step else row)
    return compared[winner(candidates)]


def standard_error(values: list[float]) -> float:
    """Standard error of the mean of `values`."""
    return stdev(values) / math.sqrt(len(values))
