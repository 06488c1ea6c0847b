"""Reference pictures, and what follows from them for the other settings."""

from cluster.fetched import local_path
from ray_jobs.config import Config, ConfigError
from ray_jobs.console import say
from ray_jobs.data.encoding.shapes import reference_sizes
from ray_jobs.run.records import TARGET
from ray_jobs.weights.model_files import family_in


def suited_to_references(config: Config) -> Config:
    """Return the configuration with `search.rank_by` and `data.cleaning.duplicates` as they suit references,
    unless given.

    It is the same without references.

    Raises:
        ConfigError: it is to be ranked by targets, which only rows with references have.
    """
    if not config.data.num_references:
        _check_ranking(config)
        return config
    search, data = config.search, config.data
    if "rank_by" not in search.model_fields_set:
        search = search.model_copy(update={"rank_by": TARGET})
        say("references", "ranks by the distance of edits to their targets (search.rank_by: target)")
    if "duplicates" not in data.cleaning.model_fields_set:
        # Edits of one picture are alike, and several pictures may have the same target.
        cleaning = data.cleaning.model_copy(update={"duplicates": "keep"})
        data = data.model_copy(update={"cleaning": cleaning})
        say("references", "like pictures are kept, in one split (data.cleaning.duplicates: keep)")
    return config.model_copy(update={"search": search, "data": data})


def _check_ranking(config: Config) -> None:
    """Raise ConfigError if a set without references is to be ranked by targets."""
    if config.search.rank_by == TARGET:
        raise ConfigError(
            "search.rank_by: target is for models that edit reference images; name these in the "
            "reference_columns of data.sources, or choose another score"
        )


def check_references(config: Config) -> None:
    """Check that the model takes as many reference pictures as the sources name, their size, and that only
    rows with references are ranked by targets.

    Raises:
        ConfigError: one of these is not so.
    """
    count, base = config.data.num_references, config.model.base
    if not count:
        _check_ranking(config)
        return
    family = family_in(local_path(base), revision=config.model.revision)
    if count > family.max_references:
        takes = f"at most {family.max_references}" if family.max_references else "none"
        raise ConfigError(
            f"data.sources: reference_columns: {count} reference images a row, but {base} "
            f"({family.pipeline_class}) takes {takes}; remove them, or choose a model that edits images, as "
            "FLUX.1 Kontext, FLUX.2 or FLUX.3"
        )
    reference_sizes(config)
