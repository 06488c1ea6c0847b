"""What a trial is called: one name for one choice of settings, which folders, addresses and MLflow take."""

import itertools
import re
from typing import Any

import pytest

from ray_jobs.run.names import LONGEST, trial_id

VALUES: list[Any] = [
    *(
        0,
        1,
        -1,
        0.5,
        -0.5,
        1e-5,
        -1e-5,
        1.5e-5,
        0.1234567,
        0.12345671,
        0.1234568,
        1234567,
        1234568,
        1e6,
        1e20,
    ),
    *(True, False, None),
    *("True", "true", "False", "None", "none", "null", "", "-", "1", "1.0", "0.5", "-0.5", "1e-05", "inf"),
    *("cosine", "Cosine", "COSINE", "cosine_with_restarts", "cosine-with-restarts", "cosine with restarts"),
    *(
        "a/b",
        "a:b",
        "a?b",
        "a#b",
        "a%2Fb",
        "a'b",
        'a"b',
        "a\\b",
        "../b",
        ".",
        "..",
        "~b",
        "$b",
        "a\nb",
        "é",
        "ü",
    ),
    *(
        [],
        ["to_q"],
        ["to_q", "to_k"],
        ["to_k", "to_q"],
        ["to_q_to_k"],
        ["to-q", "to-k"],
        [[]],
        [None],
        [0.9, 0.99],
    ),
    *({}, {"rank": 8}, {"rank": "8"}),
    *("x" * 500, "x" * 501, ["x" * 500]),
]


def test_names_are_one_to_one() -> None:
    names = [trial_id({"train.learning_rate": 1e-3, "train.lora.any": value}) for value in VALUES]
    values = [repr(value) for value in VALUES]
    assert len(set(values)) == len(values)
    # Letter case tells no two apart: some file systems do not know it.
    same = {name.lower() for name in names}
    pairs = [(a, b) for a, b in itertools.combinations(sorted(names), 2) if a.lower() == b.lower()]
    assert len(same) == len(values), pairs


def test_names_are_plain_and_not_long() -> None:
    for value in VALUES:
        name = trial_id({"train.learning_rate": 1e-3, "train.deepspeed.a/b c": value, "train.x": value})
        assert re.fullmatch(r"lr-[A-Za-z0-9._+-]+", name) and len(name) <= LONGEST
    many = {f"train.setting_{number}": number / 7 for number in range(40)}
    other = many | {"train.setting_39": 0}
    assert len({trial_id(many), trial_id(other)}) == 2 and len(trial_id(many)) <= LONGEST


def test_combinations_of_values_are_one_to_one() -> None:
    some = [value for value in VALUES if not isinstance(value, str) or len(value) < 100]
    names = {trial_id({"train.a": one, "train.b": other}) for one in some for other in some}
    assert len(names) == len(some) ** 2


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (8, "8"),
        (1e-5, "1e-05"),
        (0.000125, "0.000125"),
        (True, "True"),
        (None, "None"),
        ("cosine_with_restarts", "cosine-with-restarts"),
        ("logit_normal", "logit-normal"),
    ],
)
def test_names_of_former_runs_stay(value: Any, text: str) -> None:
    assert trial_id({"train.x": value}) == f"x-{text}"


def test_equal_numbers_have_one_name() -> None:
    assert trial_id({"train.x": 8.0}) == trial_id({"train.x": 8})
    assert trial_id({"train.x": -0.0}) == trial_id({"train.x": 0}) == "x-0"
