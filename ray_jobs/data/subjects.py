"""Subjects of a few photos, and what follows from them for the other settings."""

from cluster.storage import Storage
from ray_jobs.config import Config, ConfigError, SourceConfig, resolve_path
from ray_jobs.console import say
from ray_jobs.data.curation.decisions import HOLD_OUT_FROM
from ray_jobs.data.preparation import open_sources
from ray_jobs.data.sources.dreambooth import DREAMBOOTH_FILE, Subject
from ray_jobs.run.records import SUBJECT

MOST_FOLDS = 4  # each of them is a training
PHOTOS_A_FOLD = 2


def subjects_of(config: Config) -> list[Subject]:
    """Return the sources that are subjects."""
    return [source for source in open_sources(config) if isinstance(source, Subject)]


def suited_to_subjects(config: Config) -> Config:
    """Return the configuration with `search.rank_by` and folds as they suit its subjects, unless given.

    It is the same if a source is no subject.

    Raises:
        ConfigError: it is to be ranked by subjects, and a source is none.
    """
    # Listing a source of many files takes long, and says nothing where it has no prompts.
    subjects = subjects_of(config) if all(map(_may_be_subject, config.data.all_sources)) else []
    if len(subjects) < len(config.data.all_sources):
        if config.search.rank_by == SUBJECT:
            raise ConfigError(
                "search.rank_by: subject needs sources that are subjects, and no others; give each an "
                "instance_prompt, or choose another score"
            )
        return config
    search, data, told = config.search, config.data, []
    if "rank_by" not in search.model_fields_set:
        search = search.model_copy(update={"rank_by": SUBJECT})
        told.append("ranks by likeness and what can be lost (search.rank_by: subject)")
    folds = num_folds(sum(subject.num_photos for subject in subjects))
    if folds and _may_have_folds(config):
        search, data = search.model_copy(update={"folds": folds}), data.model_copy(update={"folds": folds})
        told.append(
            f"each candidate is trained {folds} times, without another part of the photos, and the winner on "
            f"all of them (search.folds: {folds}; 0 trains once, and compares with the photos trained on)"
        )
    for line in told:
        say("subject", line)
    return config.model_copy(update={"search": search, "data": data})


def _may_be_subject(source: SourceConfig) -> bool:
    """Return whether there are prompts for a source, without listing it."""
    return bool(source.instance_prompt) or Storage.open(resolve_path(source.path)).exists(DREAMBOOTH_FILE)


def num_folds(photos: int) -> int:
    """Number of folds for so many photos; 0 if there are enough of them for a split."""
    return min(MOST_FOLDS, photos // PHOTOS_A_FOLD) if photos < HOLD_OUT_FROM else 0


def _may_have_folds(config: Config) -> bool:
    """Return whether folds were not decided on, and go with the other settings."""
    search, data = config.search, config.data
    given = "folds" in search.model_fields_set | data.model_fields_set
    return not (
        given or search.guidance_scales or search.scheduler == "population" or data.encode == "stream"
    )
