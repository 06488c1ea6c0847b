"""Votes: a folder of them as sources of rows, splits without a prompt in two, and their statistics."""

import math
from pathlib import Path

import numpy as np
import pytest

from cluster.storage import Storage
from ray_jobs.config import Config, ConfigError, load_config
from ray_jobs.data.curation.decisions import decide
from ray_jobs.data.curation.splits import content_digest
from ray_jobs.data.preparation import open_sources
from ray_jobs.data.votes import require_votes, votes_config
from ray_jobs.metrics.votes import (
    evidence_of_worse,
    mean_of_groups,
    votes_needed,
    wilson_interval,
    wrongly_ordered,
)
from ray_jobs.run.manifest import Manifest
from tests.indexed import indexed, write_rows
from tests.unit.test_sources import lines, picture, samples, write

DEMO = Path(__file__).parents[2] / "configs" / "demo.yaml"


def pairs(folder: Path, count: int = 3) -> Path:
    rows = [
        {
            "prompt": f"do {n}",
            "chosen": {"seed": n},
            "rejected": {"seed": n + 1},
            "chosen_image": f"images/{n}.png",
            "rejected_image": f"images/{10 + n}.png",
        }
        for n in range(count)
    ]
    images: dict[str, bytes | str] = {
        f"images/{n}.png": picture(n) for n in (*range(count), *range(10, 10 + count))
    }
    return Path(write(folder, {"preferences.jsonl": lines(rows), **images}))


def ratings(folder: Path) -> Path:
    files: dict[str, bytes | str] = {}
    for name, first in (("liked", 0), ("disliked", 10)):
        rows = [{"file_name": f"{n}.png", "text": f"do {n}"} for n in range(first, first + 2)]
        files |= {f"{name}/metadata.jsonl": lines(rows)}
        files |= {f"{name}/{n}.png": picture(n) for n in range(first, first + 2)}
    return Path(write(folder, files))


def configured(folder: Path, *overrides: str) -> Config:
    return load_config(DEMO, [f'train.preference={{"votes": ["{folder}"]}}', *overrides])


def prepared_with(config: Config) -> Config:
    assert config.train.preference
    return votes_config(config, config.train.preference, config.train.preference.votes)


def test_a_pair_is_one_row_of_the_preferred_picture_and_the_other(tmp_path: Path) -> None:
    config = prepared_with(configured(pairs(tmp_path)))
    [source] = open_sources(config)
    rows = samples(source)
    assert [row.text for row in rows] == ["do 0", "do 1", "do 2"]
    assert [row.data for row in rows] == [picture(n) for n in range(3)]
    assert [row.further for row in rows] == [(picture(10 + n),) for n in range(3)]
    assert config.data.num_references == 1 and config.data.split_by == "caption"


@pytest.mark.parametrize("make", [pairs, ratings])
def test_liked_pictures_are_of_sources_with_an_even_number(tmp_path: Path, make: object) -> None:
    assert callable(make)
    folder = make(tmp_path)
    settings = ["train.preference.loss=kto", "train.preference.liked_share=0.75"]
    config = prepared_with(configured(folder, *settings))
    liked, others = open_sources(config)
    assert [row.data for row in samples(liked)][:2] == [picture(0), picture(1)]
    assert [row.data for row in samples(others)][:2] == [picture(10), picture(11)]
    assert config.data.weights == {0: 0.75, 1: 0.25}


def test_the_rows_of_a_prompt_are_in_one_split(tmp_path: Path) -> None:
    config = prepared_with(configured(pairs(tmp_path)))
    index, dataset = Storage.open(str(tmp_path / "index")), Storage.open(str(tmp_path / "decided"))
    texts = [*("seven", "eight", "nine") * 20, *map(str, range(60))]
    write_rows(
        index, "a", [{"text": text, "digest": content_digest(bytes([n]))} for n, text in enumerate(texts)]
    )
    splits = np.array(decide(config, [indexed("a")], index, dataset).splits.tolist())
    for number in range(3):
        assert len(set(splits[number:60:3])) == 1
    assert set(splits[60:]) == {"train", "validation", "test"}


def test_a_folder_without_votes_says_how_to_get_some(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="neither preferences.jsonl nor liked/ and disliked/"):
        prepared_with(configured(tmp_path))
    (tmp_path / "preferences.jsonl").write_text("")
    with pytest.raises(ConfigError, match="there are no votes yet"):
        prepared_with(configured(tmp_path))
    (tmp_path / "preferences.jsonl").write_text('{"prompt": "a cat"}\n')
    with pytest.raises(ConfigError, match="chosen_image is missing; export the pairs with their images"):
        prepared_with(configured(tmp_path))


def test_ratings_are_no_pairs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="set train.preference.loss: kto"):
        prepared_with(configured(ratings(tmp_path)))


def test_too_few_votes_are_told_with_the_number_that_is_needed(tmp_path: Path) -> None:
    config = prepared_with(configured(pairs(tmp_path)))
    with pytest.raises(ConfigError, match="194 held-out ones, 1,294 in all"):
        require_votes(config, Manifest(train=12, held_out=False))


def test_votes_needed_by_hand() -> None:
    # (1.95996 / 2 + 0.84162 sqrt(0.24))^2 / 0.01 = 193.8
    assert votes_needed(0.6) == 194
    assert votes_needed(0.4) == votes_needed(0.6)


def test_wilson_interval_by_hand() -> None:
    # 8 of 10: (0.8 + 0.19207) / 1.38415 = 0.71674; 1.95996 / 1.38415 sqrt(0.016 + 0.0096037) = 0.22658
    low, high = wilson_interval(8, 10)
    assert (low, high) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson_interval(0, 0) == (0, 1)


def test_wrong_votes_by_hand() -> None:
    wrong = wrongly_ordered([1.0, -2.0, 0.0, 3.0])
    assert wrong == [0, 1, 0.5, 0]
    share, error = mean_of_groups(wrong, ["a", "b", "c", "d"])
    assert share == pytest.approx(0.375)
    # deviations -0.375, 0.625, 0.125, -0.375: squares 0.6875, times 4 / 3 over 16
    assert error == pytest.approx(math.sqrt(0.6875 / 12))
    # in two groups of sums 0.25 and -0.25: 2 / 1 (2 / 16) / 16
    assert mean_of_groups(wrong, ["a", "a", "b", "b"])[1] == pytest.approx(math.sqrt(1 / 64))
    assert mean_of_groups(wrong, ["a"] * 4)[1] is None


def test_evidence_of_worse_by_hand() -> None:
    # One lost vote: 2^2 (1/2 - 1/8); one won: 2^2 / 8. Both together: no evidence lost or won on average.
    assert evidence_of_worse(0, 1) == pytest.approx(1.5)
    assert evidence_of_worse(1, 0) == pytest.approx(0.5)
    grid = (np.arange(200_000) + 0.5) / 400_000
    by_sum = 2.0**101 * float(np.mean(grid**40 * (1 - grid) ** 60)) / 2
    assert evidence_of_worse(40, 60) == pytest.approx(by_sum, rel=1e-6)
    assert evidence_of_worse(900, 3000) > 1e100


def test_a_model_that_is_no_worse_is_rarely_suspected_however_often_one_looks() -> None:
    generator, level, length, runs = np.random.default_rng(0), 0.05, 200, 300
    suspected = found = 0
    for _ in range(runs):
        for share, counted in ((0.5, "same"), (0.3, "worse")):
            won = np.cumsum(generator.random(length) < share)
            seen = [evidence_of_worse(int(w), n - int(w)) for n, w in enumerate(won, 1) if n % 5 == 0]
            if max(seen) >= 1 / level:
                suspected, found = suspected + (counted == "same"), found + (counted == "worse")
    assert suspected / runs <= level
    assert found / runs > 0.95
