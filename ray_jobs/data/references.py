"""Reference pictures and masks to paint into, and what follows from them for the other settings."""

from cluster.fetched import local_path
from ray_jobs.config import Config, ConfigError
from ray_jobs.console import say
from ray_jobs.data.encoding.shapes import painter, reference_sizes
from ray_jobs.run.records import TARGET
from ray_jobs.weights.model_files import family_in


def num_before(config: Config) -> int:
    """Return the number of pictures that a row's own is made from: its references, or itself with a hole."""
    return config.data.num_references or int(painter(config) is not None)


def suited_to_references(config: Config) -> Config:
    """Return the configuration with settings as they suit references or masks to paint into, unless given.

    These are `search.rank_by`, `data.cleaning.duplicates` and `evaluate.guidance_scale`.

    It is the same without these.

    Raises:
        ConfigError: it is to be ranked by targets, which only rows with these have.
    """
    if not num_before(config):
        _check_ranking(config)
        return config
    search, data, evaluate = config.search, config.data, config.evaluate
    family = painter(config)
    if family and family.usual_guidance and "guidance_scale" not in evaluate.model_fields_set:
        evaluate = evaluate.model_copy(update={"guidance_scale": family.usual_guidance})
        say("references", f"draws as its pipeline does (evaluate.guidance_scale: {family.usual_guidance:g})")
    if "rank_by" not in search.model_fields_set:
        search = search.model_copy(update={"rank_by": TARGET})
        say("references", "ranks by the distance of edits to their targets (search.rank_by: target)")
    if "duplicates" not in data.cleaning.model_fields_set:
        # Edits of one picture are alike, and several pictures may have the same target.
        cleaning = data.cleaning.model_copy(update={"duplicates": "keep"})
        data = data.model_copy(update={"cleaning": cleaning})
        say("references", "like pictures are kept, in one split (data.cleaning.duplicates: keep)")
    return config.model_copy(update={"search": search, "data": data, "evaluate": evaluate})


def _check_ranking(config: Config) -> None:
    """Raise ConfigError if a set without references or masks to paint into is to be ranked by targets."""
    if config.search.rank_by == TARGET and not num_before(config):
        raise ConfigError(
            "search.rank_by: target is for models that edit reference images or paint into masks; name "
            "these in the reference_columns or mask_column of data.sources, or choose another score"
        )


def check_references(config: Config) -> None:
    """Check that the model takes as many reference pictures as the sources name, their size, and that only
    rows with references are ranked by targets.

    Raises:
        ConfigError: one of these is not so, or it paints into masks, or edits only, and the sources name
            none.
    """
    count, base = config.data.num_references, config.model.base
    family = family_in(local_path(base), revision=config.model.revision)
    if family.paints_masks and not config.data.has_masks:
        raise ConfigError(
            f"data.sources: mask_column is missing: {base} ({family.pipeline_class}) paints into a mask of "
            "each row; name the column of masks, which are white where the image is to be painted"
        )
    if family.needs_references and not count:
        raise ConfigError(
            f"data.sources: reference_columns is missing: {base} ({family.pipeline_class}) edits images; "
            "name the columns of reference images, or choose a model that draws without, as Qwen-Image"
        )
    if not count:
        _check_ranking(config)
        return
    if count > family.max_references:
        takes = f"at most {family.max_references}" if family.max_references else "none"
        raise ConfigError(
            f"data.sources: reference_columns: {count} reference images a row, but {base} "
            f"({family.pipeline_class}) takes {takes}; remove them, or choose a model that edits images, as "
            "FLUX.1 Kontext, FLUX.2, FLUX.3 or Qwen-Image-Edit"
        )
    reference_sizes(config)
