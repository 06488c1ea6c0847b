"""Measure which attributes the published model draws, beside the data and what training began from."""

from collections import Counter
from collections.abc import Mapping

from ray_jobs.config import Config
from ray_jobs.console import say
from ray_jobs.data.feeding.dataset import Dataset
from ray_jobs.evaluation.pool import EvaluatorPool
from ray_jobs.metrics.balance import by_chance, total_variation
from ray_jobs.metrics.votes import wilson_interval
from ray_jobs.run.records import Balance

MOST_REAL = 400  # pictures of each split that the classifier sees


def shares_of(*columns: Mapping[str, int]) -> dict[str, list[tuple[float, float, float]]]:
    """Return the share of each label in each column of counts, with its 95 % interval."""
    totals = [sum(counts.values()) for counts in columns]
    return {
        label: [
            (counts.get(label, 0) / max(total, 1), *wilson_interval(counts.get(label, 0), total))
            for counts, total in zip(columns, totals, strict=True)
        ]
        for label in dict.fromkeys(label for counts in columns for label in counts)
    }


def measure_balance(config: Config, dataset: Dataset, pool: EvaluatorPool, weights: str) -> Balance | None:
    """Return the measured balance; None without `evaluate.balance.classifier`.

    The data's shares are those of `data.stratify` or `data.balance`, if the values of that column are labels
    of the classifier, and else what it says of held-out pictures.
    """
    settings = config.evaluate.balance
    if settings.classifier is None:
        return None
    drawn = [
        Counter(
            label
            for prompt in settings.prompts
            for label in pool.labels(pool.prompted(each, prompt, settings.pictures))
        )
        for each in (None, weights)
    ]
    composition, known = dataset.manifest.composition, pool.label_names()
    column, data = "", Counter[str]()
    if composition and composition.column and set(composition.classes) <= set(known):
        column = composition.column
        data.update({value: each.pictures for value, each in composition.classes.items()})
    else:
        pictures = [
            row["image"] for split in ("validation", "test") for row in dataset.pictures(split, MOST_REAL)
        ]
        data.update(pool.labels(pictures))
    base, winner = (dict(each.most_common()) for each in drawn)
    chance, most = by_chance(data, sum(winner.values()))
    found = Balance(
        classifier=settings.classifier,
        prompts=len(settings.prompts),
        pictures=settings.pictures,
        column=column,
        data=dict(data.most_common()),
        base=base,
        winner=winner,
        shares=shares_of(data, base, winner),
        base_distance=total_variation(base, data),
        distance=total_variation(winner, data),
        by_chance=chance,
        at_most=most,
    )
    say("publish", f"balance: {found.distance:.2f} from the data's shares, {found.base_distance:.2f} before")
    return found
