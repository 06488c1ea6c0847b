"""The safety checker: what it blocks is not sent, nor is what it could not look at."""

import numpy as np
import pytest

from ray_jobs.config import ConfigError
from serving.replica.safety import load_checker
from serving.schemas import APIError

HERE = "tests.serving.plain_pictures"
DRAWN = np.random.default_rng(0).integers(0, 256, (16, 12, 3), dtype=np.uint8)
PLAIN = np.full((8, 8, 3), 200, dtype=np.uint8)


def test_a_blocked_picture_is_openais_error_and_its_neighbours_are_sent() -> None:
    first, second, third = load_checker(f"{HERE}:make_checker").judge([DRAWN, PLAIN, DRAWN])
    assert first is DRAWN and third is DRAWN
    assert isinstance(second, APIError)
    assert (second.status, second.code) == (400, "content_policy_violation")
    assert second.body()["error"]["type"] == "invalid_request_error"
    assert "nearly all of one colour" in second.message


def test_a_blocked_picture_may_be_replaced() -> None:
    [drawn, covered] = load_checker(f"{HERE}:make_covering_checker").judge([DRAWN, PLAIN])
    assert drawn is DRAWN
    assert isinstance(covered, np.ndarray)
    assert covered.dtype == np.uint8 and covered.shape == PLAIN.shape and (covered == 128).all()


def test_no_pictures_need_no_checker() -> None:
    assert load_checker(f"{HERE}:make_broken_checker").judge([]) == []


@pytest.mark.parametrize("broken", ["make_broken_checker", "make_untyped_checker"])
def test_a_checker_that_fails_blocks_all(broken: str, caplog: pytest.LogCaptureFixture) -> None:
    answers = load_checker(f"{HERE}:{broken}").judge([DRAWN, DRAWN])
    assert len(answers) == 2
    for answer in answers:
        assert isinstance(answer, APIError)
        assert (answer.status, answer.code) == (500, "safety_check_failed")
    assert "the safety checker failed" in caplog.text


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("my_checks", "write it as module:function"),
        (":make_checker", "write it as module:function"),
        ("no_such_module:make", "cannot be imported (ModuleNotFoundError: No module named 'no_such_module')"),
        (f"{HERE}:nothing", f"{HERE} has no function nothing"),
        (f"{HERE}:LEAST_SPREAD", "has no function LEAST_SPREAD"),
        (f"{HERE}:make_nothing", "it returned NoneType, not a checker"),
        (f"{HERE}:make_none_without_weights", "(FileNotFoundError: no weights at /models/checker)"),
    ],
)
def test_a_checker_that_cannot_be_loaded_names_the_field_and_the_reason(name: str, expected: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_checker(name)
    assert f"serve.safety_checker: {name}: " in str(refused.value) and expected in str(refused.value)
