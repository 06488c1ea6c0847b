"""Votes as a data set: rows of pairs, or of liked images and others, prepared as every other set is.

All rows of a prompt are in one split, whichever round of votes they are from: validation has the held-out
votes that a search goes by, test those that a version is compared with the champion by.
"""

import math
from collections.abc import Sequence

from cluster.fetched import local_path
from cluster.storage import Storage
from ray_jobs.config import Config, ConfigError, DataConfig, SourceConfig, VotesConfig, resolve_path
from ray_jobs.console import say
from ray_jobs.data.curation.decisions import HOLD_OUT_FROM
from ray_jobs.data.sources.metadata import CHOSEN, PREFERENCES, REJECTED
from ray_jobs.metrics.votes import TOLD_APART, votes_needed
from ray_jobs.run.manifest import Manifest
from ray_jobs.run.records import VOTES
from ray_jobs.weights.model_files import family_in

PROMPT = "prompt"
LIKED, DISLIKED = "liked", "disliked"
FIELD = "train.preference.votes"


def suited_to_votes(config: Config) -> Config:
    """Return the configuration with `search.rank_by: votes` if it trains on votes, unless given."""
    search = config.search
    if config.train.preference is None or "rank_by" in search.model_fields_set:
        return config
    say("votes", "ranks by held-out votes, where FID is not worse (search.rank_by: votes)")
    return config.model_copy(update={"search": search.model_copy(update={"rank_by": VOTES})})


def check_votes(config: Config) -> None:
    """Raise ConfigError if the model's captions are encoded with images, which votes do not have."""
    family = family_in(local_path(config.model.base), revision=config.model.revision)
    if family.text.sees_references:
        raise ConfigError(
            f"train.preference: {config.model.base} ({family.pipeline_class}) encodes captions with "
            "reference images, which votes do not have; choose another base"
        )


def votes_config(config: Config, votes: VotesConfig, folders: Sequence[str]) -> Config:
    """Return the configuration with which votes are prepared: as the data set's, but for its sources.

    Args:
        folders: of the votes.

    Raises:
        ConfigError: a folder has no votes of the kind that `train.preference.loss` learns from, or none with
            images.
    """
    sources = [source for path in folders for source in _sources(path, votes)]
    own = config.data
    kept = (
        *("resolution", "buckets", "bucket_max_aspect_ratio", "background", "validation", "test"),
        *("split_seed", "encode", "encode_batch_size", "encode_workers", "encode_dtype"),
        "shuffle_mb",
    )
    given = {name: getattr(own, name) for name in kept if name in own.model_fields_set}
    cleaning = own.cleaning.model_dump(exclude_unset=True)
    for name in ("duplicate_distance", "duplicate_colour"):
        cleaning.pop(name, None)
    data = DataConfig.model_validate(
        {
            **given,
            "encode_precision": own.encode_precision,
            "sources": [source.model_dump(exclude_unset=True) for source in sources],
            # Images of different prompts may be alike; what must not be in two splits is a prompt.
            "cleaning": cleaning | {"duplicates": "ignore"},
            "split_by": "caption",
        }
    )
    return config.model_copy(update={"data": data})


def _sources(path: str, votes: VotesConfig) -> list[SourceConfig]:
    """Return the sources of a folder of votes. With kto liked images are of those with an even number."""
    folder = Storage.open(resolve_path(path))
    pairs = [name for name in PREFERENCES if folder.exists(name)]
    rated = [name for name in (LIKED, DISLIKED) if folder.exists(name)]
    if pairs:
        _require_images(folder, pairs[0], path)
        if votes.loss == "dpo":
            chosen = {"image_column": CHOSEN, "reference_columns": [REJECTED], "caption_column": PROMPT}
            return [SourceConfig.model_validate({"path": path} | chosen)]
        columns = [{"image_column": name, "caption_column": PROMPT} for name in (CHOSEN, REJECTED)]
        found: list[dict[str, object]] = [{"path": path, **each} for each in columns]
    elif len(rated) == 2 and votes.loss == "kto":
        found = [{"path": f"{path.rstrip('/')}/{name}"} for name in (LIKED, DISLIKED)]
    elif rated and votes.loss == "dpo":
        raise ConfigError(
            f"{FIELD}: {path}: has ratings, but no pairs, from which loss: dpo learns; set "
            "train.preference.loss: kto, or export preferences"
        )
    else:
        raise ConfigError(
            f"{FIELD}: {path}: has neither {PREFERENCES[0]} nor {LIKED}/ and {DISLIKED}/; name a folder that "
            "`diffray feedback preferences --draw URL --out FOLDER` has written"
        )
    if votes.liked_share is not None:
        shares = (votes.liked_share, 1 - votes.liked_share)
        found = [each | {"weight": share} for each, share in zip(found, shares, strict=True)]
    return [SourceConfig.model_validate(each) for each in found]


def _require_images(folder: Storage, file: str, path: str) -> None:
    """Raise ConfigError if pairs were exported without their images, or there are none."""
    if not file.endswith(".jsonl"):
        return
    first = next(iter(folder.read_lines(file)), None)
    if first is None:
        raise ConfigError(f"{FIELD}: {path}/{file} is empty: there are no votes yet; {needed_text()}")
    if missing := [name for name in (PROMPT, CHOSEN, REJECTED) if name not in first]:
        raise ConfigError(
            f"{FIELD}: {path}/{file}: {missing[0]} is missing; export the pairs with their images: diffray "
            "feedback preferences --draw URL"
        )


def require_votes(config: Config, manifest: Manifest) -> None:
    """Raise ConfigError if there are too few votes to hold any out."""
    if not manifest.held_out:
        paths = ", ".join(source.path for source in config.data.sources)
        raise ConfigError(
            f"{FIELD}: {paths}: {manifest.train} votes are too few to hold any out, and {HOLD_OUT_FROM} are "
            f"needed; {needed_text(config.data.validation)}"
        )


def needed_text(held_out: float = 0.15) -> str:
    """Say how many votes are needed for which difference."""
    least = votes_needed(TOLD_APART)
    return (
        f"to tell {TOLD_APART:.0%} of votes for a model from half of them takes {least} held-out ones, "
        f"{math.ceil(least / held_out):,} in all with data.validation: {held_out:g}"
    )
