"""User studies: blind pairs in an order of each rater's own, votes over HTTP, and what they say."""

import io
import json
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from diffray.study import create, lines_of, prompts_of, report
from ray_jobs.config import Config, ConfigError
from ray_jobs.data.feeding.dataset import PARTS
from ray_jobs.registry.models import RegisteredModel
from ray_jobs.run.folder import RunFolder, SharedFolder
from serving.client import EndpointError, call
from serving.feedback.database import open_database
from serving.feedback.store import FeedbackStore, Vote
from serving.feedback.studies import (
    Item,
    Study,
    folder_of,
    next_pair,
    read_study,
    require_study,
    result_of,
    votes_of,
)
from serving.schemas import APIError
from tests.conftest import captions
from tests.serving.page_server import page_server
from tests.serving.test_service import versions, watched  # noqa: F401  fixtures
from tests.serving.test_web import CHROMIUM, browser  # noqa: F401
from tests.small_set import PICTURES, small_set
from tests.unit.test_affects import configured

ITEMS = [Item(prompt=f"p{n}", seed=n, images=(f"a{n}", f"b{n}")) for n in range(8)]
STUDY = Study(name="s", versions=("m@1", "m@2"), items=ITEMS)


def votes(of: dict[str, str]) -> list[Vote]:
    """Votes of each rater: a letter per pair, of the version that was preferred; . for none."""
    found = []
    for key, letters in of.items():
        for number, letter in enumerate(letters):
            if letter != ".":
                other = "b" if letter == "a" else "a"
                found.append(Vote(f"{letter}{number}", f"{other}{number}", key))
    return found


def test_pairs_come_in_an_order_and_on_sides_of_the_raters_own_until_all_have_a_vote() -> None:
    orders: dict[str, list[str]] = {}
    lefts: dict[str, list[str]] = {}
    for key in ("ann", "ben"):
        given: list[Vote] = []
        while (shown := next_pair(STUDY, given, key)).left:
            assert shown.right and shown.done == len(given)
            lefts.setdefault(key, []).append(shown.left)
            orders.setdefault(key, []).append(str(shown.prompt))
            given.append(Vote(shown.left, shown.right, key))
        assert sorted(orders[key]) == [item.prompt for item in ITEMS]
        assert shown.done == shown.total == 8
    assert orders["ann"] != orders["ben"]
    assert len({each[0] for each in lefts["ann"]}) == 2, "neither version is always on the left"


def test_a_result_by_hand() -> None:
    given = votes({"ann": "bbbbbbba", "ben": "bbbbab.."})
    found = result_of(STUDY, votes_of(STUDY, [*given, Vote("x", "y", "ann")]))
    assert (found.raters, found.votes) == (2, 14)
    assert found.share == pytest.approx(12 / 14)
    assert found.interval and found.interval[0] > 0.5
    # Six pairs with two votes: bb five times, ab once; n_a = 1, n_b = 11: 1 - 11 * 2 / (144 - 122).
    assert found.alpha == pytest.approx(1 - 11 * 2 / 22)
    assert any("m@2 was preferred to m@1 in 85.7%" in line for line in lines_of(found))


def test_an_undecided_study_says_how_many_votes_it_takes() -> None:
    found = result_of(STUDY, votes({"ann": "abababab"}))
    assert found.alpha is None
    lines = lines_of(found)
    assert any("to tell 60% from half takes 194 votes" in line for line in lines)
    assert any("agreement: unknown" in line for line in lines)
    assert lines_of(result_of(STUDY, []))[-1] == "no votes yet"


def test_prompts_are_captions_of_the_test_split_unless_a_file_has_others(tmp_path: Path) -> None:
    config = configured().model_copy(update={"storage": str(tmp_path)})
    options = Namespace(prompts=None, count=99, seed=0)
    with pytest.raises(ConfigError, match="--prompts: .* has no prepared test split"):
        prompts_of(config, options)
    prepared = small_set(SharedFolder.of(config).encoded("00"))
    folder = RunFolder.of(config).dataset
    folder.write_text(PARTS, prepared.storage.read_text(PARTS))
    (prepared.manifest | {"encoders": "00"}).write(folder)
    held_out = {captions()[number] for number in PICTURES["test"]}
    assert sorted(prompts_of(config, options)) == sorted(held_out)
    (tmp_path / "lines").write_text("a red apple\n\n")
    options.prompts = str(tmp_path / "lines")
    assert prompts_of(config, options) == ["a red apple"]


@pytest.mark.parametrize("name", ["../spring", ".", "a b", "", "-a", "a" * 64])
def test_a_name_that_is_no_studys_is_refused_and_not_looked_for(tmp_path: Path, name: str) -> None:
    config = configured().model_copy(update={"storage": str(tmp_path)})
    with pytest.raises(ConfigError, match="--name: .* give letters"):
        create(config, Namespace(name=name))
    with pytest.raises(APIError, match="there is no study"):
        require_study(config, name)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[FeedbackStore]:
    store = FeedbackStore(open_database(f"sqlite:///{tmp_path}/feedback.db"))
    yield store
    store.close()


def test_a_study_is_drawn_rated_and_reported(
    watched: Config,  # noqa: F811
    versions: list[RegisteredModel],  # noqa: F811
    store: FeedbackStore,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    (tmp_path / "prompts.txt").write_text("a red apple\na blue cross\n\na red apple\n")
    serve = watched.serve.model_copy(update={"feedback_url": f"sqlite:///{tmp_path}/feedback.db"})
    config = watched.model_copy(update={"name": tmp_path.name, "serve": serve})
    given = {"name": "spring", "versions": ["1", "2"], "count": 9, "seed": 0}
    with page_server(config, versions[0], versions[1], store) as url:
        options = Namespace(**given, url=url, prompts=str(tmp_path / "prompts.txt"))
        page = create(config, options)
        study = read_study(config, "spring")
        assert study and {item.prompt for item in study.items} == {"a red apple", "a blue cross"}
        with pytest.raises(ConfigError, match="there is a study spring already"):
            create(config, options)
        api = f"{url}/v1/feedback"
        shown = call(f"{api}/studies/spring")
        assert shown["total"] == 2 and "watched@" not in json.dumps(shown)
        kept = folder_of(config, "spring").read_bytes(f"{shown['left']}.png")
        with Image.open(io.BytesIO(kept)) as image:
            assert not image.info, "the image would say which version drew it"
        with pytest.raises(EndpointError, match="there is no study"):
            call(f"{api}/studies/autumn")
        with pytest.raises(EndpointError, match="has no image"):
            call(f"{api}/studies/spring/images/img-0")
        call(api, {"image_id": shown["left"], "over": shown["right"]})
        if CHROMIUM:
            _rate_in_browser(request, page)
        else:
            shown = call(f"{api}/studies/spring")
            call(api, {"image_id": shown["left"], "over": shown["right"]})
        assert call(f"{api}/studies/spring")["left"] is None
    found = report(config, Namespace(name="spring"))
    assert (found.votes, found.raters, found.pairs) == (2, 1, 2)
    assert "Study spring" in folder_of(config, "spring").read_text("report.html")


def _rate_in_browser(request: pytest.FixtureRequest, page: str) -> None:
    context = request.getfixturevalue("browser").new_context()
    try:
        shown = context.new_page()
        shown.goto(page)
        shown.wait_for_selector("#pair:not([hidden])")
        assert shown.inner_text("#progress") == "1 of 2"
        assert shown.inner_text("#prompt") in ("a red apple", "a blue cross")
        shown.click("#prefer-right")
        shown.get_by_text("That was all").wait_for()
        assert shown.inner_text("#progress") == "2 of 2"
    finally:
        context.close()
