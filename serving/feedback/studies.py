"""User studies: images of two versions for the same prompts and seeds, which raters see blind.

`<storage>/<run>/studies/<name>/` has `study.json` and the images, without the metadata that names a version.
Votes are kept with all other feedback.
"""

import hashlib
import io
import re
from collections.abc import Sequence

from PIL import Image
from pydantic import BaseModel, ValidationError

from cluster.storage import Storage
from ray_jobs.config import Config, ConfigError
from ray_jobs.config.fields import explain
from ray_jobs.metrics.agreement import krippendorff_alpha
from ray_jobs.metrics.votes import mean_of_groups, wilson_interval
from ray_jobs.run.folder import RunFolder
from serving.feedback.store import Vote
from serving.schemas import APIError

STUDY = "study.json"
NAME = re.compile(r"[A-Za-z0-9][\w-]{0,62}")  # of a study; it is a folder's name, and part of a URL
NORMAL_95 = 1.96


class Item(BaseModel):
    """A pair of images of one prompt and seed: their ids, of the first version and of the second."""

    prompt: str
    seed: int
    images: tuple[str, str]


class Study(BaseModel):
    """A study of two versions, each as name@3."""

    name: str
    versions: tuple[str, str]
    items: list[Item]


class NextPair(BaseModel):
    """Answer to GET /v1/feedback/studies/{name}: what a rater sees next, without the versions' names.

    Attributes:
        done: number of pairs that this rater has voted on.
        left, right: ids of the images; None if all pairs have a vote.
    """

    name: str
    total: int
    done: int
    prompt: str | None = None
    left: str | None = None
    right: str | None = None


class StudyResult(BaseModel):
    """Result of a study.

    Attributes:
        share: of votes for the second version, over all raters; None without votes.
        interval: 95 % interval of the share, in which the votes on a prompt depend on each other.
        alpha: Krippendorff's alpha of the raters; None if no pair has two votes.
    """

    name: str
    versions: tuple[str, str]
    pairs: int
    raters: int
    votes: int
    share: float | None
    interval: tuple[float, float] | None
    alpha: float | None


def folder_of(config: Config, name: str) -> Storage:
    """Return the folder of a study."""
    return RunFolder.of(config).study(name)


def read_study(config: Config, name: str) -> Study | None:
    """Read a study; None if there is none of that name.

    Raises:
        ConfigError: its file is damaged.
    """
    folder = folder_of(config, name)
    if not folder.exists(STUDY):
        return None
    try:
        return Study.model_validate_json(folder.read_text(STUDY))
    except ValidationError as error:
        raise ConfigError(explain(error, f"{folder.uri}/{STUDY}")) from None


def without_metadata(png: bytes) -> bytes:
    """Return an image's pixels as a PNG without the version, seed and settings that it carries."""
    with Image.open(io.BytesIO(png)) as image:
        image.load()
        image.info.clear()
        file = io.BytesIO()
        image.save(file, format="PNG")
    return file.getvalue()


def next_pair(study: Study, votes: Sequence[Vote], key: str) -> NextPair:
    """Return the next pair for a rater: in an order, and on sides, that are the rater's own and random.

    Args:
        votes: of the study, by all raters.
        key: id of the rater's key.
    """
    done = {frozenset(vote[:2]) for vote in votes if vote.key_id == key}
    left = [item for item in study.items if frozenset(item.images) not in done]
    found = NextPair(name=study.name, total=len(study.items), done=len(study.items) - len(left))
    if not left:
        return found
    item = min(left, key=lambda each: _hashed(study.name, key, *each.images))
    images = sorted(item.images, key=lambda image: _hashed(study.name, key, "side", image))
    return found.model_copy(update={"prompt": item.prompt, "left": images[0], "right": images[1]})


def _hashed(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def votes_of(study: Study, votes: Sequence[Vote]) -> list[Vote]:
    """Return the votes on the pairs of a study."""
    pairs = {frozenset(item.images) for item in study.items}
    return [vote for vote in votes if frozenset(vote[:2]) in pairs]


def result_of(study: Study, votes: Sequence[Vote]) -> StudyResult:
    """Return the result of a study.

    Args:
        votes: of the study, by all raters.
    """
    places = {frozenset(item.images): item for item in study.items}
    values, prompts = list[float](), list[str]()
    units: dict[frozenset[str], list[bool]] = {}
    for vote in votes:
        pair = frozenset(vote[:2])
        second = vote.winner_id == places[pair].images[1]
        values.append(float(second))
        prompts.append(places[pair].prompt)
        units.setdefault(pair, []).append(second)
    share, interval = None, None
    if values:
        share, error = mean_of_groups(values, prompts)
        interval = wilson_interval(sum(values), len(values))
        if error is not None:  # the wider one: with few votes, or all alike, the error of groups is too small
            low, high = share - NORMAL_95 * error, share + NORMAL_95 * error
            interval = max(0.0, min(interval[0], low)), min(1.0, max(interval[1], high))
    return StudyResult(
        name=study.name,
        versions=study.versions,
        pairs=len(study.items),
        raters=len({vote.key_id for vote in votes}),
        votes=len(votes),
        share=share,
        interval=interval,
        alpha=krippendorff_alpha(list(units.values())),
    )


def require_study(config: Config, name: str) -> Study:
    """Return a study for a request.

    Raises:
        APIError: 404, there is none of that name.
    """
    found = read_study(config, name) if NAME.fullmatch(name) else None
    if found is None:
        raise APIError(404, f"there is no study {name!r}", code="study_not_found")
    return found
