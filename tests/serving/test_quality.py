"""Versions are withdrawn, promoted and taken back by what people say of their images, and by drift."""

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ray_jobs.config import Config
from ray_jobs.registry.aliases import aliases_of
from ray_jobs.registry.models import RegisteredModel, entries, open_client
from serving.feedback.database import open_database
from serving.feedback.store import Compared, FeedbackStore
from serving.load import DriftScores
from serving.service.quality import Quality, at_least
from serving.service.rollout import TAKEN_OUT
from serving.service.service import Service
from tests.serving.generations import generation, rated
from tests.serving.test_service import served, versions, watched  # noqa: F401  fixtures

DRIFT = DriftScores(200, 30.0, 20.0, None, 0.02, 0.01, "n", 0.0)
NOTHING = Compared(0, 0)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[FeedbackStore]:
    store = FeedbackStore(open_database(f"sqlite:///{tmp_path}/feedback.db"))
    yield store
    store.close()


def test_votes_between_versions_and_ratings_in_turns_are_comparisons(store: FeedbackStore) -> None:
    # 1 to 3 of the champion, 4 to 7 of the candidate, 8 of neither.
    of = {**dict.fromkeys((1, 2, 3), 3), **dict.fromkeys((4, 5, 6, 7), 4), 8: 2}
    for number, version in of.items():
        store.record(generation(number, version=version, prompt=f"prompt {number}"))
    store.flush()
    store.rate(rated(4, None, over=f"img-{1:024x}"), "ann")
    store.rate(rated(2, None, over=f"img-{5:024x}"), "ann")
    store.rate(rated(8, None, over=f"img-{4:024x}"), "ann")  # between other versions
    for number, rating in ((1, -1), (4, 1), (2, 1), (5, 1), (6, -1)):
        store.rate(rated(number, rating), "ben")
    # Votes: one each. Ratings in turns: -1 and 1, 1 and 1; the third of the candidate has no other.
    assert store.compared("served", 4, 3) == (2, 1)
    assert store.compared("served", 3, 4) == (1, 2)


def test_a_key_counts_once_for_a_prompt(store: FeedbackStore) -> None:
    for number in range(1, 21):
        store.record(generation(number, version=3 + number % 2))
    store.flush()
    for number in range(1, 21):
        store.rate(rated(number, -1 if number % 2 else 1), "one key")
    assert store.compared("served", 4, 3) == (0, 1)


def test_a_version_that_loses_is_withdrawn_and_one_that_wins_is_promoted() -> None:
    quality = Quality(level=0.01, promotes=0.01)
    assert quality.objection(Compared(10, 12), None) is None
    reason = quality.objection(Compared(2, 18), None)
    assert reason and reason.startswith("feedback: people preferred it in 2 of 20 comparisons")
    assert quality.is_better(Compared(18, 2)) and not quality.is_better(Compared(12, 10))
    assert Quality(level=0.0).objection(Compared(0, 100), None) is None
    assert not Quality(level=0.01).is_better(Compared(100, 0))


def test_a_version_that_people_like_as_much_is_rarely_withdrawn_and_a_bad_one_soon() -> None:
    quality, generator, runs = Quality(level=0.05), np.random.default_rng(1), 200
    withdrawn, after = {0.5: 0, 0.25: 0}, list[int]()
    for share in withdrawn:
        for _ in range(runs):
            won = np.cumsum(generator.random(150) < share).tolist()
            seen = (Compared(wins, n - wins) for n, wins in enumerate(won, 1))
            steps = (sum(each) for each in seen if quality.objection(each, None))
            if (first := next(steps, None)) is not None:
                withdrawn[share] += 1
                after += [first] if share < 0.5 else []
    assert withdrawn[0.5] / runs <= 0.05
    assert withdrawn[0.25] / runs > 0.95 and np.median(after) < 50


def test_drift_and_near_copies_are_limits_where_they_are_set() -> None:
    quality = Quality(level=0.01, drift=2.0)
    assert quality.objection(NOTHING, DRIFT) is None
    assert Quality(level=0.01).objection(NOTHING, replace(DRIFT, fid=400.0)) is None
    reason = quality.objection(NOTHING, replace(DRIFT, fid=41.0))
    assert reason == "drift: FID 41.0 of the last 200 images, 20.0 when published"
    reason = quality.objection(NOTHING, replace(DRIFT, near_copies=0.06))
    assert reason and reason.startswith("near copies: 6.0% of the last 200 images, 1.0% by chance")


def test_at_least_by_hand() -> None:
    assert at_least(0, 3, 0.5) == 1
    assert at_least(2, 3, 0.5) == pytest.approx(0.5)  # 3/8 + 1/8


def judged(
    config: Config, both: list[RegisteredModel], store: FeedbackStore, lost: int, aliases: dict[str, str]
) -> dict[str, int]:
    """The aliases after 40 votes between the versions, of which the second has lost so many."""
    client = open_client(config)
    for alias in aliases_of(client, config):
        client.delete_registered_model_alias("watched", alias)
    for alias, number in aliases.items():
        client.set_registered_model_alias("watched", alias, number)
    for place in range(1, 41):
        for version, image in ((1, place), (2, 100 + place)):
            store.record(generation(image, model="watched", version=version))
    store.flush()
    for place in range(1, 41):
        better, worse = (place, 100 + place) if place <= lost else (100 + place, place)
        store.rate(rated(better, None, over=f"img-{worse:024x}"))

    async def judge(service: Service, _: Any) -> None:
        service.catalogue.entries = await asyncio.to_thread(entries, config, ["watched"])
        if "candidate" not in aliases:
            service.catalogue.champion, service.catalogue.candidate = both[1], None
        await service.judge_quality()
        await asyncio.gather(*service.background.tasks)

    served(config, both, store, judge)
    return aliases_of(client, config)


def test_the_endpoint_withdraws_promotes_and_takes_back(
    watched: Config,  # noqa: F811
    versions: list[RegisteredModel],  # noqa: F811
    store: FeedbackStore,
) -> None:
    serve = watched.serve.model_copy(update={"promote_feedback": 0.01})
    config, rollout = watched.model_copy(update={"serve": serve}), {"champion": "1", "candidate": "2"}
    assert judged(config, versions, store, 20, rollout) == {"champion": 1, "candidate": 2}
    assert judged(config, versions, store, 36, rollout) == {"champion": 1}
    tags = open_client(config).get_model_version("watched", "2").tags
    assert tags[TAKEN_OUT].startswith("feedback: people preferred it in 4 of 40 comparisons")
    assert judged(config, versions, store, 4, rollout) == {"champion": 2, "previous": 1}
    promoted = {"champion": "2", "previous": "1"}
    assert judged(config, versions, store, 20, promoted) == {"champion": 2, "previous": 1}
    assert judged(config, versions, store, 36, promoted) == {"champion": 1}
