"""`diffray update`: what a round trains on, when one is due, and what is refused before it is trained."""

from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from diffray.update import Round, config_of, count_of, due, update
from ray_jobs.config import Config, ConfigError, load_config
from ray_jobs.registry.promotion import Measured
from ray_jobs.registry.registration import register
from ray_jobs.run.folder import RunFolder
from serving import rollout
from serving.feedback.store import FeedbackStore, Period
from tests.serving.conftest import save_adapters
from tests.serving.generations import generation, rated

DEMO = Path(__file__).parents[2] / "configs" / "demo.yaml"
LAST = Round(
    number=2, since=5.0, until=9.0, champion="emoji@3", run="demo-update-2", feedback="f/2", exported=300
)
FIRST = LAST | {"number": 1, "feedback": "f/1", "version": 2}


def configured(*overrides: str) -> Config:
    return load_config(DEMO, ["publish.model_name=emoji", *overrides])


def test_a_round_trains_on_its_votes_from_the_champion_and_is_held_to_those_before() -> None:
    config = configured('search.space={"train.lora.rank": [8, 16]}', "train.preference.votes=mine")
    found = config_of(config, LAST, [FIRST])
    assert found.name == "demo-update-2" and found.model.adapter == "emoji@3"
    assert found.train.preference
    assert (found.train.preference.votes, found.train.preference.earlier) == (["f/2"], ["f/1"])
    assert found.search.rank_by == "votes" and found.publish.release == "canary"
    assert not found.search.space, "the champion's adapter decides its form"
    assert found.data == config.data, "the test split is the champion's"


def test_votes_of_a_round_that_was_held_back_hold_no_later_one_back() -> None:
    assert (FIRST | {"decision": "candidate: its votes"}).was_released
    assert not (FIRST | {"decision": "held back: the new votes contradict them"}).was_released
    assert not LAST.was_released


def test_liked_images_are_mixed_with_the_data_set() -> None:
    found = config_of(configured("update.train_on=liked", "update.liked_share=0.25"), LAST, [])
    assert found.train.preference is None
    weights = {each.path: each.weight for each in found.data.sources}
    assert weights == {"examples/fluent-emoji": 0.75, "f/2": 0.25}
    assert [each.training_only for each in found.data.sources] == [False, True], "the test split is as before"


@pytest.fixture(scope="module")
def registered(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run with a champion."""
    storage = tmp_path_factory.mktemp("updates")
    config = configured(f"storage={storage}", f"model.base={tiny_model}", "update.url=http://127.0.0.1:9")
    folder = save_adapters(tiny_model, storage / "adapter", 1)
    measured = Measured(10.0, None, num_samples=9, feature_network="n", data="9f" * 32)
    register(config, source=str(folder), measured=measured, params={})
    return config


@pytest.fixture
def run(registered: Config, tmp_path: Path) -> Config:
    """The run, and no feedback yet."""
    serve = registered.serve.model_copy(update={"feedback_url": f"sqlite:///{tmp_path}/feedback.db"})
    return registered.model_copy(update={"serve": serve})


def vote(config: Config, count: int) -> None:
    store = FeedbackStore.open(config)
    for number in range(2 * count):
        store.record(generation(number, model="emoji", version=1))
    store.flush()
    for number in range(count):
        store.rate(rated(2 * number, None, over=f"img-{2 * number + 1:024x}"))
    store.close()


def test_too_few_votes_are_told_before_any_image_is_drawn(run: Config) -> None:
    vote(run, 5)
    with pytest.raises(ConfigError, match="5 votes since the last update are too few, and 20 are needed"):
        update(run, Namespace(draw=None, if_due=False))


def test_a_schedule_waits_for_enough_votes(run: Config, capsys: pytest.CaptureFixture[str]) -> None:
    vote(run, 30)
    assert update(run, Namespace(draw=None, if_due=True)) is None
    assert "not due: 30 new votes, 200 are waited for" in capsys.readouterr().out


def test_votes_are_counted_once_by_period(run: Config) -> None:
    vote(run, 30)
    store = FeedbackStore.open(run)
    try:
        assert count_of(run, store, Period()) == 30
        assert count_of(run, store, Period(since=4e9)) == 0
    finally:
        store.close()


def test_drift_makes_an_update_due(monkeypatch: pytest.MonkeyPatch) -> None:
    scores: dict[str, Any] = {
        "num_pictures": 200,
        "expected_fid": 20.0,
        "clip_score": None,
        "near_copies": None,
    }
    scores |= {"expected_near_copies": None, "feature_network": "n", "scored_at": 0.0, "fid": 45.0}
    answer: dict[str, Any] = {
        **{"champion": "emoji@1", "candidate": None, "candidate_share": 0.0, "versions": {}},
        **{"feedback": [], "taken_out": {}, "shadow": {"stored": 0, "passed_over": 0}, "notice": None},
        "quality": {"emoji@1": scores},
    }
    monkeypatch.setattr(rollout, "call", lambda url, key=None: answer)
    config = configured("update.after_drift=2")
    champion: Any = SimpleNamespace(name="emoji", version=1)
    assert due(config, 3, champion, "http://x").startswith("due: the champion's drift FID is 45.0")
    assert due(configured("update.after_drift=3"), 3, champion, "http://x") == ""


def test_drift_is_not_passed_over_without_an_endpoint_that_tells_it() -> None:
    champion: Any = SimpleNamespace(name="emoji", version=1)
    with pytest.raises(ConfigError, match=r"update\.after_drift: .* give its URL as --draw"):
        due(configured("update.after_drift=2"), 3, champion, None)


def test_without_an_endpoint_nothing_can_be_drawn_again(run: Config) -> None:
    vote(run, 30)
    config = run.model_copy(update={"update": run.update.model_copy(update={"url": None})})
    with pytest.raises(ConfigError, match="--draw: images are not kept"):
        update(config, Namespace(draw=None, if_due=False))


def test_an_endpoint_that_does_not_answer_is_told_and_no_round_begins(run: Config) -> None:
    vote(run, 30)
    with pytest.raises(ConfigError, match="no answer"):
        update(run, Namespace(draw=None, if_due=False))
    assert not RunFolder.of(run).root.exists("updates.jsonl")
