"""Points of a search space: the settings of its trials."""

from collections.abc import Mapping

from ray_jobs.config import LEARNING_RATE, Config, Settings
from ray_jobs.config.space import drawn, grid


def other_settings(settings: Mapping[str, object]) -> Settings:
    """Settings without the learning rate, which is a field of its own in every row."""
    return {name: value for name, value in settings.items() if name != LEARNING_RATE}


def points(config: Config) -> list[Settings]:
    """Return the settings of all trials of a search whose algorithm is grid or random.

    Grid gives every combination. Random draws distinct ones with the run's seed, so an interrupted search
    gets the same trials again.
    """
    dimensions = config.search.dimensions
    if config.search.algorithm == "grid":
        return grid(dimensions)
    return drawn(dimensions, config.search.grid_size, config.seed)
