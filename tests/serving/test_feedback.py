"""What is kept of served pictures survives a kill; ratings and votes are each key's last word."""

import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy

from ray_jobs.config import Config, ConfigError
from serving.feedback.database import SCHEMA, feedback_url, generations, metadata, open_database
from serving.feedback.schemas import FeedbackRequest, new_image_id
from serving.feedback.store import FeedbackStore
from serving.schemas import APIError
from tests.postgresql import postgresql_server, programs
from tests.serving.feedback_server import FEEDBACK_KEY, feedback_server
from tests.serving.generations import generation, rated

ROOT = Path(__file__).parents[2]


@pytest.fixture()
def database(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/feedback.db"


@pytest.fixture(scope="module")
def postgresql() -> Iterator[str]:
    """The URL of a PostgreSQL database of this module's own."""
    if (found := programs()) is None:
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    with postgresql_server(found) as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def either(request: pytest.FixtureRequest, database: str) -> str:
    """The URL of an empty database of either kind."""
    if request.param == "sqlite":
        return database
    url: str = request.getfixturevalue("postgresql")
    engine = sqlalchemy.create_engine(url)
    metadata.drop_all(engine)
    engine.dispose()
    return url


@pytest.fixture()
def store(either: str) -> Iterator[FeedbackStore]:
    store = FeedbackStore(open_database(either))
    yield store
    store.close()


def test_a_generation_comes_back_as_it_was_recorded(store: FeedbackStore) -> None:
    told = generation(
        adapter="fox", negative_prompt="blur \N{FOX FACE}", user="key-1", key_id="k1", role="candidate"
    )
    store.record(told)
    store.flush()
    assert store.generations([told.image_id, new_image_id()]) == [told]


def test_a_picture_can_be_rated_as_soon_as_it_is_recorded(store: FeedbackStore) -> None:
    for number in range(50):
        store.record(generation(number))
        assert store.rate(rated(number, comment="nice")).rating == 1
    assert len(store.ratings()) == 50


def test_a_later_rating_of_a_key_replaces_the_former_and_no_other_keys(store: FeedbackStore) -> None:
    store.record(generation(1))
    for key, rating, comment in (("key-1", 1, "good"), ("key-2", 1, None), ("key-1", -1, None)):
        store.rate(rated(1, rating, comment=comment), key)
    assert [tuple(each)[1:] for each in store.ratings()] == [("key-1", -1, None), ("key-2", 1, None)]


def test_a_later_vote_of_a_key_replaces_the_former_also_the_other_way_round(store: FeedbackStore) -> None:
    for number in (1, 2):
        store.record(generation(number))
    first, second = (f"img-{number:024x}" for number in (1, 2))
    store.rate(rated(1, None, over=second), "key-1")
    store.rate(rated(2, None, over=first), "key-1")
    assert [tuple(vote) for vote in store.votes()] == [(second, first, "key-1")]
    assert store.ratings() == []


@pytest.mark.parametrize(("number", "over", "param"), [(9, None, "image_id"), (1, 9, "over")])
def test_an_unknown_picture_is_a_404_that_names_the_field(
    store: FeedbackStore, number: int, over: int | None, param: str
) -> None:
    store.record(generation(1))
    with pytest.raises(APIError) as refused:
        store.rate(rated(number, over=f"img-{over:024x}" if over else None))
    assert (refused.value.status, refused.value.param) == (404, param)
    assert refused.value.code == "image_not_found"
    assert store.ratings() == store.votes() == []


def test_versions_are_tallied_apart(store: FeedbackStore) -> None:
    for number, role in enumerate(["champion", "champion", "candidate"], 1):
        store.record(generation(number, role=role, version=4 if role == "candidate" else 3))
    for number, rating in ((1, 1), (2, -1), (3, 1)):
        store.rate(rated(number, rating))
    store.rate(rated(3, None, over=f"img-{1:024x}"))
    told = [astuple(each) for each in store.tally()]
    assert told == [("served", 3, "champion", 1, 1, 0, 1), ("served", 4, "candidate", 1, 0, 1, 0)]


def test_without_its_tables_nothing_is_tallied_and_that_is_said(database: str) -> None:
    store = FeedbackStore(open_database(database))
    metadata.drop_all(sqlalchemy.create_engine(database))
    with pytest.raises(APIError) as refused:
        store.tally()
    assert (refused.value.status, refused.value.code) == (503, "feedback_unavailable")
    store.close()


def test_any_text_can_be_kept(store: FeedbackStore) -> None:
    store.record(
        generation(1, prompt="zero \0, emoji \N{FOX FACE}, right to left \u202e, '; DROP TABLE ratings")
    )
    store.rate(rated(1, comment="\0\U0010ffff"))
    [kept] = store.generations([f"img-{1:024x}"])
    assert kept.prompt == "zero \ufffd, emoji \N{FOX FACE}, right to left \u202e, '; DROP TABLE ratings"


def test_generations_of_before_a_time_are_deleted_with_their_feedback(store: FeedbackStore) -> None:
    for number in range(1, 1203):
        store.record(generation(number))
    store.flush()
    store.rate(rated(1), "key")
    store.rate(rated(1202, over=f"img-{2:024x}"), "key")
    store.rate(rated(1202), "key")
    assert store.delete_before(1000 + 1200) == 1199
    kept = [f"img-{number:024x}" for number in (1, 2, 1200, 1201, 1202)]
    assert [each.image_id for each in store.generations(kept)] == kept[2:]
    assert [each.image_id for each in store.ratings()] == kept[4:] and not store.votes()
    assert store.delete_before(1000 + 1200) == 0


def test_a_full_queue_makes_the_caller_wait_and_drops_nothing(database: str) -> None:
    store = FeedbackStore(open_database(database), capacity=3)
    lock = sqlite3.connect(database.removeprefix("sqlite:///"), isolation_level=None)
    lock.execute("BEGIN IMMEDIATE")  # another process writes: the writer's thread has to wait
    try:
        with pytest.raises(APIError) as refused:
            for number in range(600):
                store.record(generation(number), timeout_s=0.2)
        assert (refused.value.status, refused.value.code) == (503, "feedback_unavailable")
        rest = [generation(n) for n in range(number, 600)]
        recorder = threading.Thread(target=lambda: list(map(store.record, rest)))
        recorder.start()
        time.sleep(0.2)
        assert recorder.is_alive()
    finally:
        lock.execute("ROLLBACK")
    recorder.join()
    store.close()
    again = FeedbackStore(open_database(database))
    assert len(again.generations([f"img-{n:024x}" for n in range(600)])) == 600
    again.close()


def test_a_generation_that_is_refused_takes_no_other_with_it(
    database: str, caplog: pytest.LogCaptureFixture
) -> None:
    store = FeedbackStore(open_database(database))
    with sqlalchemy.create_engine(database).begin() as connection:
        connection.execute(
            sqlalchemy.text(
                "CREATE TRIGGER refuse BEFORE INSERT ON generations WHEN NEW.seed = 2 "
                "BEGIN SELECT RAISE(ABORT, 'no twos'); END"
            )
        )
    for number in (1, 2, 3):
        store.record(generation(number))
    store.flush()
    kept = store.generations([f"img-{n:024x}" for n in (1, 2, 3)])
    assert [each.seed for each in kept] == [1, 3]
    store.close()
    assert "no twos" in caplog.text and f"img-{2:024x}" in caplog.text


CHILD = """
import sys
from serving.feedback.store import FeedbackStore
from serving.feedback.database import open_database
from tests.serving.generations import generation, rated
store = FeedbackStore(open_database(sys.argv[1]))
for number in range(10**6):
    store.record(generation(number))
    store.rate(rated(number), "key-1")
    print(number, flush=True)
"""


def test_every_rating_that_was_answered_survives_a_kill(either: str) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, either],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert child.stdout
    answered = [int(child.stdout.readline()) for _ in range(20)]
    child.send_signal(signal.SIGKILL)
    answered += [int(line) for line in child.stdout]
    assert child.wait() == -signal.SIGKILL
    store = FeedbackStore(open_database(either))
    kept = {each.image_id for each in store.ratings()}
    assert {f"img-{number:024x}" for number in answered} <= kept
    assert len(store.generations(sorted(kept))) == len(kept)
    store.close()


def test_two_processes_may_share_a_new_database(either: str) -> None:
    script = (
        "import sys; from serving.feedback.store import FeedbackStore; "
        "from serving.feedback.database import open_database; "
        "from tests.serving.generations import generation; "
        "store = FeedbackStore(open_database(sys.argv[1])); "
        "[store.record(generation(int(sys.argv[2]) + n)) for n in range(200)]; store.close()"
    )
    children = [
        subprocess.Popen([sys.executable, "-c", script, either, str(1000 * n)], cwd=ROOT) for n in range(2)
    ]
    assert [child.wait() for child in children] == [0, 0]
    with open_database(either).connect() as connection:
        count = sqlalchemy.func.count(generations.c.image_id)
        assert connection.scalar(sqlalchemy.select(count)) == 400


def test_sqlite_keeps_a_write_ahead_log_and_syncs_every_commit(database: str) -> None:
    with open_database(database).connect() as connection:
        names = ("journal_mode", "synchronous", "foreign_keys")
        told = [connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in names]
    assert told == ["wal", 2, 1]  # 2 is FULL


def test_tables_of_an_older_program_are_brought_up_to_date_once(either: str) -> None:
    engine = open_database(either)
    with engine.begin() as connection:
        for column in ("negative_prompt", "num_references", "adapters", "control_scale", "guidance_interval"):
            connection.exec_driver_sql(f"ALTER TABLE generations DROP COLUMN {column}")
        connection.exec_driver_sql(
            "ALTER TABLE generations ADD COLUMN negative_prompt TEXT NOT NULL DEFAULT ''"
        )
        connection.exec_driver_sql("UPDATE feedback_schema SET version = 1")
        for number, text in ((1, ""), (2, "blur")):
            added = {"num_references", "adapters", "control_scale", "guidance_interval"}
            row = generation(number, negative_prompt=text).model_dump(exclude=added)
            connection.execute(generations.insert().values(row))
    with ThreadPoolExecutor(4) as pool:
        engines = list(pool.map(open_database, [either] * 4))
    store = FeedbackStore(engines[0])
    adapters: list[dict[str, str | float]] = [{"name": "styles@3#12", "scale": 0.7}]
    store.record(generation(3, negative_prompt="", num_references=2, adapters=adapters, control_scale=0.5))
    store.flush()
    names = [f"img-{number:024x}" for number in (1, 2, 3)]
    assert [each.negative_prompt for each in store.generations(names)] == [None, "blur", ""]
    assert [each.num_references for each in store.generations(names)] == [None, None, 2]
    assert [each.control_scale for each in store.generations(names)] == [None, None, 0.5]
    assert [each.adapters for each in store.generations(names)] == [None, None, adapters]
    store.rate(rated(1))
    store.close()


def test_a_newer_schema_is_refused_and_left_alone(either: str) -> None:
    engine = open_database(either)
    with engine.begin() as connection:
        connection.exec_driver_sql(f"UPDATE feedback_schema SET version = {SCHEMA + 1}")
        connection.exec_driver_sql("DROP TABLE ratings")
    expected = rf"serve\.feedback_url: .* tables have version {SCHEMA + 1}, .* knows version {SCHEMA}; update"
    with pytest.raises(ConfigError, match=expected):
        open_database(either)
    assert not sqlalchemy.inspect(engine).has_table("ratings")


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("not a url", "not the URL of a database"),
        ("mysql+pymysql://host/x", "serve.feedback_url: "),
        ("sqlite:////nowhere/at/all/feedback.db", "unable to open database file"),
        (f"sqlite:///{ROOT}/README.md", "file is not a database"),
    ],
)
def test_a_database_that_cannot_be_opened_names_its_field(url: str, expected: str) -> None:
    with pytest.raises(ConfigError) as refused:
        open_database(url)
    assert "serve.feedback_url" in str(refused.value) and expected in str(refused.value)


def configured(storage: str, feedback_url: str | None = None) -> Config:
    return Config.model_validate(
        {
            "name": "demo",
            "storage": storage,
            "data": {"source": "unused"},
            "model": {"base": "unused"},
            "search": {"learning_rates": [1e-3], "ladder": [2]},
            "serve": {"feedback_url": feedback_url},
        }
    )


def test_by_default_it_lies_in_the_storage_folder(tmp_path: Path) -> None:
    FeedbackStore.open(configured(f"{tmp_path}/new folder?%20")).close()
    assert (tmp_path / "new folder?%20" / "feedback.db").is_file()


def test_a_relative_url_is_no_file_in_the_copy_that_a_job_runs_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, copy = tmp_path / "home", tmp_path / "copy"
    for folder in (home, copy):
        folder.mkdir()
    monkeypatch.chdir(copy)
    monkeypatch.setenv("DIFFRAY_HOME", str(home))
    FeedbackStore.open(configured("runs", "sqlite:///feedback.db")).close()
    assert (home / "feedback.db").is_file() and not list(copy.iterdir())


def test_remote_storage_needs_a_url() -> None:
    with pytest.raises(ConfigError, match=r"serve\.feedback_url: missing.* cannot lie in s3://bucket/runs"):
        feedback_url(configured("s3://bucket/runs"))
    url = "postgresql+psycopg://user@host/diffray"
    assert feedback_url(configured("s3://bucket/runs", url)) == url


# Over HTTP


@pytest.fixture()
def url(store: FeedbackStore) -> Iterator[str]:
    store.record(generation(1))
    store.record(generation(2))
    with feedback_server(store) as url:
        yield url


def give(url: str, body: Any) -> httpx.Response:
    headers = {"Authorization": f"Bearer {FEEDBACK_KEY}"}
    return httpx.post(f"{url}/v1/feedback", json=body, headers=headers, trust_env=False)


def test_feedback_is_kept_when_it_is_answered(url: str, store: FeedbackStore) -> None:
    first, second = (f"img-{number:024x}" for number in (1, 2))
    answer = give(url, {"image_id": first, "rating": 1, "comment": "nice", "over": second})
    assert answer.status_code == 200
    told = answer.json()
    assert told.pop("created") == pytest.approx(time.time(), abs=60)
    assert told == {"object": "feedback", "image_id": first, "rating": 1, "comment": "nice", "over": second}
    assert [tuple(each) for each in store.ratings()] == [(first, "key-1", 1, "nice")]
    assert [tuple(each) for each in store.votes()] == [(first, second, "key-1")]


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"image_id": "img-" + "9" * 24, "rating": 1}, 404, "image_id"),
        ({"image_id": "img-1", "rating": 1}, 400, "image_id"),
        ({"image_id": f"img-{1:024x}", "rating": 5}, 400, "rating"),
        ({"image_id": f"img-{1:024x}", "rating": 0.5}, 400, "rating"),
        ({"image_id": f"img-{1:024x}"}, 400, None),
        ({"image_id": f"img-{1:024x}", "over": f"img-{1:024x}"}, 400, "over"),
        ({"image_id": f"img-{1:024x}", "rating": 1, "stars": 5}, 400, "stars"),
        ({"image_id": f"img-{1:024x}", "rating": 1, "comment": "a" * 2001}, 400, "comment"),
    ],
)
def test_what_is_no_feedback_is_refused_in_openais_shape(
    url: str, body: dict[str, Any], status: int, param: str | None
) -> None:
    answer = give(url, body)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert error["param"] == param and error["type"] == "invalid_request_error" and error["message"]


def test_the_examples_of_the_document_are_valid_and_shown(url: str) -> None:
    document = httpx.get(f"{url}/openapi.json", trust_env=False).json()
    body = document["paths"]["/v1/feedback"]["post"]["requestBody"]["content"]["application/json"]
    values = [FeedbackRequest.model_validate(each["value"]) for each in body["examples"].values()]
    assert [value.rating for value in values] == [1, None]
