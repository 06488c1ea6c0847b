"""What people said becomes data: pairs for preference training, and a folder that the pipeline reads."""

import io
import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi import FastAPI
from PIL import Image
from pyarrow import parquet

from ray_jobs.config import SourceConfig, load_config
from ray_jobs.data.preparation import open_sources
from ray_jobs.data.sources.detection import open_source
from ray_jobs.data.votes import votes_config
from serving.engine.thread import EngineThread
from serving.export import main
from serving.feedback.database import open_database
from serving.feedback.store import FeedbackStore
from tests.serving.drawing_server import drawing_server, pixels_of
from tests.serving.feedback_server import FEEDBACK_KEY
from tests.serving.generations import generation, rated
from tests.serving.http_server import http_server
from tests.unit.test_sources import samples

APPLE, FOX = "a red apple", "a fox \N{FOX FACE}"


def image(number: int) -> str:
    return f"img-{number:024x}"


@pytest.fixture()
def store(tmp_path: Path) -> Iterator[FeedbackStore]:
    """Seven pictures: 1 to 4 of an apple, 5 to 7 of a fox."""
    (tmp_path / "runs").mkdir()
    store = FeedbackStore(open_database(f"sqlite:///{tmp_path}/runs/feedback.db"))
    for number in range(1, 8):
        store.record(generation(number, prompt=APPLE if number < 5 else FOX, steps=2))
    store.flush()
    yield store
    store.close()


@pytest.fixture()
def arguments(tmp_path: Path) -> list[str]:
    config = {
        "name": "demo",
        "storage": str(tmp_path / "runs"),
        "data": {"source": "unused"},
        "model": {"base": "unused"},
        "search": {"learning_rates": [1e-3], "ladder": [2]},
    }
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    return ["--config", str(tmp_path / "config.yaml"), "--out", str(tmp_path / "out")]


@pytest.fixture(scope="module")
def thread(tiny_model: Path) -> Iterator[EngineThread]:
    from ray_jobs.weights.loading import load_pipeline
    from serving.engine.engine import Engine

    thread = EngineThread(Engine(load_pipeline(str(tiny_model)), max_rows=4))
    thread.start()
    yield thread
    thread.stop()


def test_feedback_whose_record_was_deleted_is_told_and_the_rest_is_exported(
    store: FeedbackStore, arguments: list[str], tmp_path: Path
) -> None:
    store.rate(rated(1, None, over=image(2)), "ann")
    store.rate(rated(3, None, over=image(4)), "ann")
    store.rate(rated(5, 1), "ann")
    with sqlite3.connect(tmp_path / "runs" / "feedback.db") as database:
        database.execute(f"DELETE FROM generations WHERE image_id IN ('{image(2)}', '{image(5)}')")
    main(["preferences", *arguments])
    assert [row["chosen"]["seed"] for row in exported(tmp_path)] == [3]
    assert told(tmp_path)["left_out"]["feedback on a picture whose record was deleted"] == 2


def told(tmp_path: Path) -> Any:
    return json.loads((tmp_path / "out" / "export.json").read_text())


def exported(tmp_path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tmp_path / "out" / "preferences.jsonl").read_text().splitlines()]


def pairs(tmp_path: Path) -> list[tuple[Any, ...]]:
    rows = exported(tmp_path)
    return [(r["prompt"], r["chosen"]["seed"], r["rejected"]["seed"], r["source"], r["people"]) for r in rows]


def test_votes_and_opposite_ratings_become_pairs(
    store: FeedbackStore, arguments: list[str], tmp_path: Path
) -> None:
    for key in ("key-a", "key-b", "key-c"):
        store.rate(rated(2, None, over=image(1)), key)
    store.rate(rated(1, None, over=image(2)), "key-d")
    for number, rating in ((3, 1), (4, 1), (1, -1), (5, 0), (6, -1)):
        store.rate(rated(number, rating), "key-a")
    main(["preferences", *arguments])
    assert pairs(tmp_path) == [(APPLE, 2, 1, "vote", 2), (APPLE, 3, 1, "rating", 1)]
    reason = "a rating without an opposite one of the same key and prompt"
    assert told(tmp_path) == {"pairs": 2, "left_out": {reason: 2}}


def test_what_compares_nothing_is_left_out_and_told(
    store: FeedbackStore, arguments: list[str], tmp_path: Path
) -> None:
    store.rate(rated(5, None, over=image(1)), "key-a")
    store.rate(rated(5, None, over=image(6)), "key-a")
    store.rate(rated(6, None, over=image(5)), "key-b")
    store.rate(rated(1, 1), "key-a")
    store.rate(rated(2, -1), "key-b")  # another person's taste
    main(["preferences", *arguments])
    assert exported(tmp_path) == []
    assert told(tmp_path)["left_out"] == {
        "a pair with as many votes for either picture": 1,
        "a rating without an opposite one of the same key and prompt": 2,
        "a vote between pictures of different prompts": 1,
    }


def test_a_pair_has_all_that_draws_it_again_and_nothing_of_who_asked(
    store: FeedbackStore, arguments: list[str], tmp_path: Path
) -> None:
    store.record(generation(8, user="key-a", key_id="key-1", negative_prompt="blur", adapter="fox"))
    store.rate(rated(8, None, over=image(1), comment="mine"), "key-1")
    main(["preferences", *arguments])
    text = (tmp_path / "out" / "preferences.jsonl").read_text()
    assert json.loads(text)["chosen"] == {
        "image_id": image(8),
        "model": "served",
        "version": 3,
        "adapter": "fox",
        "guidance_interval": None,
        "adapters": None,
        "negative_prompt": "blur",
        "seed": 8,
        "steps": 4,
        "guidance_scale": 3.0,
        "size": "64x64",
    }
    assert "key-a" not in text and "key-1" not in text and "mine" not in text


def test_the_same_database_gives_the_same_files_also_as_parquet(
    store: FeedbackStore, arguments: list[str], tmp_path: Path
) -> None:
    for first, second in ((7, 6), (2, 1), (5, 6), (4, 3)):
        store.rate(rated(first, None, over=image(second)), "key-a")
    main(["preferences", *arguments])
    before = (tmp_path / "out" / "preferences.jsonl").read_bytes()
    main(["preferences", *arguments, "--format", "parquet"])
    main(["preferences", *arguments])
    assert (tmp_path / "out" / "preferences.jsonl").read_bytes() == before
    assert parquet.read_table(tmp_path / "out" / "preferences.parquet").to_pylist() == exported(tmp_path)


def test_pairs_have_their_pictures_drawn_again(
    store: FeedbackStore, arguments: list[str], tmp_path: Path, thread: EngineThread
) -> None:
    store.rate(rated(2, None, over=image(1)))
    with drawing_server(thread) as url:
        main(["preferences", *arguments, "--draw", url, "--key", FEEDBACK_KEY])
    [row] = exported(tmp_path)
    for side, number in (("chosen", 2), ("rejected", 1)):
        drawn = np.asarray(Image.open(tmp_path / "out" / row[f"{side}_image"])).astype(int)
        [asked] = store.generations([image(number)])
        assert np.abs(drawn - pixels_of(thread, asked)).max() <= 1


@pytest.mark.parametrize("negative", [None, "", "blur"])
def test_no_negative_prompt_is_asked_for_as_none_and_an_empty_one_as_empty(
    store: FeedbackStore, arguments: list[str], tmp_path: Path, negative: str | None
) -> None:
    """They draw other pictures with some models."""
    asked: list[dict[str, Any]] = []
    api = FastAPI()

    @api.post("/v1/images/generations", status_code=400)
    def generate(body: dict[str, Any]) -> dict[str, Any]:
        asked.append(body)
        return {"error": {"message": "noted"}}

    for number in (8, 9):
        store.record(generation(number, prompt=APPLE, negative_prompt=negative))
    store.flush()
    store.rate(rated(8, None, over=image(9)))
    main(["preferences", *arguments])
    [row] = exported(tmp_path)
    assert [row[side]["negative_prompt"] for side in ("chosen", "rejected")] == [negative] * 2
    with http_server(api) as url:
        main(["preferences", *arguments, "--draw", url])
    assert asked and all(body.get("negative_prompt", None) == negative for body in asked)
    assert all(("negative_prompt" in body) == (negative is not None) for body in asked)


def test_liked_pictures_become_a_source_of_training_data(
    store: FeedbackStore, arguments: list[str], tmp_path: Path, thread: EngineThread
) -> None:
    for number, rating in ((1, 1), (6, 1), (2, -1), (3, 0)):
        store.rate(rated(number, rating), "key-a")
    store.rate(rated(6, 1), "key-b")
    with drawing_server(thread) as url:
        main(["training", *arguments, "--draw", url, "--key", FEEDBACK_KEY])
    source = open_source(SourceConfig.model_validate({"path": str(tmp_path / "out")}), None)
    *samples, rest = [sample for piece in source.pieces for sample in source.read(piece)]
    assert rest.problem and rest.problem.detail == "1 .json"  # what was exported, which is no picture
    assert [(sample.text, sample.name, sample.problem) for sample in samples] == [
        (APPLE, f"{image(1)}.png", None),
        (FOX, f"{image(6)}.png", None),
    ]
    for sample, number in zip(samples, (1, 6), strict=True):
        drawn = np.asarray(Image.open(io.BytesIO(sample.data))).astype(int)
        [asked] = store.generations([image(number)])
        assert np.abs(drawn - pixels_of(thread, asked)).max() <= 1
    assert told(tmp_path) == {
        "pictures": 2,
        "left_out": {"a picture that was not rated good on the whole": 2},
    }


@pytest.mark.parametrize(
    ("kind", "loss", "expected"),
    [
        ("preferences", "dpo", [[(APPLE, 2, [1])]]),
        ("preferences", "kto", [[(APPLE, 2, [])], [(APPLE, 1, [])]]),
        ("ratings", "kto", [[(APPLE, 2, []), (FOX, 6, [])], [(APPLE, 1, [])]]),
    ],
)
def test_what_is_exported_is_what_training_on_votes_reads(
    store: FeedbackStore,
    arguments: list[str],
    tmp_path: Path,
    tiny_model: Path,
    thread: EngineThread,
    kind: str,
    loss: str,
    expected: list[list[tuple[str, int, list[int]]]],
) -> None:
    for number, rating in ((2, 1), (6, 1), (1, -1), (3, 0)):
        store.rate(rated(number, rating), "key-a")
    with drawing_server(thread) as url:
        main([kind, *arguments, "--draw", url, "--key", FEEDBACK_KEY])
    preference = f'train.preference={{"votes": ["{tmp_path / "out"}"], "loss": "{loss}"}}'
    config = load_config(tmp_path / "config.yaml", [f"model.base={tiny_model}", preference])
    assert config.train.preference
    sources = open_sources(votes_config(config, config.train.preference, config.train.preference.votes))
    drawn = {path.read_bytes(): path.stem for path in (tmp_path / "out").rglob("*.png")}
    read = [
        [(row.text, drawn[row.data], [drawn[each] for each in row.further]) for row in samples(source)]
        for source in sources
    ]
    assert read == [
        [(text, image(number), [image(each) for each in others]) for text, number, others in rows]
        for rows in expected
    ]


def test_pictures_that_are_there_are_not_drawn_twice(
    store: FeedbackStore, arguments: list[str], tmp_path: Path, thread: EngineThread
) -> None:
    store.rate(rated(1), "key-a")
    with drawing_server(thread) as url:
        main(["training", *arguments, "--draw", url, "--key", FEEDBACK_KEY])
    main(["training", *arguments, "--draw", url, "--key", FEEDBACK_KEY])  # where nothing answers now
    assert told(tmp_path)["pictures"] == 1


@pytest.mark.parametrize(
    ("served", "reason"),
    [
        ({"version": 4}, "it was drawn with version 3, the endpoint has 4"),
        ({"provenance": False}, "the endpoint does not tell which version drew it"),
    ],
)
def test_another_versions_picture_is_not_taken_for_the_rated_one(
    store: FeedbackStore,
    arguments: list[str],
    tmp_path: Path,
    thread: EngineThread,
    served: dict[str, Any],
    reason: str,
) -> None:
    store.rate(rated(1))
    with drawing_server(thread, **served) as url:
        main(["training", *arguments, "--draw", url, "--key", FEEDBACK_KEY])
    [(told_reason, count)] = told(tmp_path)["left_out"].items()
    assert reason in told_reason and count == 1
    assert not list((tmp_path / "out").glob("*.png"))


def test_a_picture_that_the_endpoint_refuses_leaves_the_others(
    store: FeedbackStore, arguments: list[str], tmp_path: Path, thread: EngineThread
) -> None:
    store.record(generation(8, steps=101))
    for number in (1, 8):
        store.rate(rated(number))
    with drawing_server(thread) as url:
        main(["training", *arguments, "--draw", url, "--key", FEEDBACK_KEY])
    assert told(tmp_path)["pictures"] == 1
    reason = "a picture that could not be drawn: the endpoint answered 400: steps: at most 100"
    assert told(tmp_path)["left_out"] == {reason: 1}


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (["training"], "--draw: training needs pictures"),
        (
            ["training", "--draw", "http://127.0.0.1:9"],
            "--draw: http://127.0.0.1:9/v1/images/generations: no",
        ),
        (["preferences", "--format", "parquet"], "--format parquet: there are no pairs"),
    ],
)
def test_what_the_user_must_mend_is_one_line(
    store: FeedbackStore,
    arguments: list[str],
    capsys: pytest.CaptureFixture[str],
    command: list[str],
    expected: str,
) -> None:
    store.rate(rated(1))
    with pytest.raises(SystemExit) as stopped:
        main([*command, *arguments])
    shown = capsys.readouterr()
    assert stopped.value.code == 2
    assert expected in shown.out + shown.err


def test_a_wrong_key_stops_the_export(
    store: FeedbackStore, arguments: list[str], thread: EngineThread, capsys: pytest.CaptureFixture[str]
) -> None:
    store.rate(rated(1))
    with drawing_server(thread) as url, pytest.raises(SystemExit):
        main(["training", *arguments, "--draw", url, "--key", "wrong"])
    shown = capsys.readouterr()
    assert "--key: the endpoint does not accept it: give an API key" in shown.out + shown.err
