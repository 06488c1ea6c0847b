"""The space of a search: what a trial's settings are, what it is called, and which trials there are.

A trial's settings are a plain dict by the settings' full names (`train.learning_rate`, `train.lora.rank`),
which `Config.with_settings` turns into the configuration that it trains with.
"""

import math
import random
import re
from collections import Counter
from collections.abc import Mapping
from itertools import product
from typing import Any

from ray_jobs.config import LEARNING_RATE, Config, ConfigError, Range

DIGITS = 3  # significant ones of a drawn number: more would tell nothing, and names stay short
MOST_DRAWS = 1000  # a trial, until the space counts as exhausted

Settings = dict[str, Any]


def trial_id(settings: Mapping[str, Any]) -> str:
    """A trial's name, the same in every attempt: it is what a resumed run finds its state by.

    Of {"train.learning_rate": 1e-3, "train.lora.rank": 8} it is `lr-0.001_rank-8`.
    """
    last = Counter(name.rpartition(".")[2] for name in settings)
    parts = []
    for name, value in settings.items():
        short = name.rpartition(".")[2]
        known = "lr" if name == LEARNING_RATE else short if last[short] == 1 else name.removeprefix("train.")
        told = f"{value:g}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value)
        parts.append(f"{known}-{re.sub(r'[^A-Za-z0-9.+-]+', '-', told).strip('-')}")
    return "_".join(parts)


def training_of(row: Mapping[str, Any]) -> str:
    """The folder of checkpoints that a row of results.jsonl was measured in."""
    return str(row.get("training", row["trial_id"]))


def rounded(value: Any) -> Any:
    """A number to the digits that its name shows."""
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def further(settings: Mapping[str, Any]) -> Settings:
    """Without the learning rate, which every row names by itself."""
    return {name: value for name, value in settings.items() if name != LEARNING_RATE}


def points(config: Config) -> list[Settings]:
    """The trials of a search whose algorithm is grid, every combination, or random, different ones drawn with
    the run's seed: the same again after an interruption.

    Raises:
        ConfigError: a range is so narrow that the numbers in it, to three digits, are not enough.
    """
    dimensions = config.search.dimensions
    if config.search.algorithm == "grid":
        lists = [values for values in dimensions.values() if isinstance(values, list)]
        return [dict(zip(dimensions, values, strict=True)) for values in product(*lists)]
    draw, found = random.Random(config.seed), dict[str, Settings]()
    for _ in range(MOST_DRAWS * config.search.grid_size):
        drawn = {name: sample(values, draw) for name, values in dimensions.items()}
        found.setdefault(trial_id(drawn), drawn)
        if len(found) == config.search.grid_size:
            return list(found.values())
    raise ConfigError(
        f"search.num_trials: {config.search.grid_size}, but after many draws there are only {len(found)} "
        "different trials; lower it or widen the ranges"
    )


def sample(values: list[Any] | Range, draw: random.Random) -> Any:
    """One value of a dimension of the space."""
    if not isinstance(values, Range):
        return draw.choice(values)
    if not values.log:
        return rounded(draw.uniform(values.low, values.high))
    return rounded(math.exp(draw.uniform(math.log(values.low), math.log(values.high))))
