"""The points of a search's space, which are the settings of its trials."""

from collections.abc import Mapping
from typing import Any

from ray_jobs.config import LEARNING_RATE, Config, Settings
from ray_jobs.config.space import drawn, grid


def further(settings: Mapping[str, Any]) -> Settings:
    """Without the learning rate, which every row names by itself."""
    return {name: value for name, value in settings.items() if name != LEARNING_RATE}


def points(config: Config) -> list[Settings]:
    """The trials of a search whose algorithm is grid, every combination, or random, different ones drawn with
    the run's seed: the same again after an interruption."""
    dimensions = config.search.dimensions
    if config.search.algorithm == "grid":
        return grid(dimensions)
    return drawn(dimensions, config.search.grid_size, config.seed)
