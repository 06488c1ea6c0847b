"""Rates and numbers of open requests, by a clock that the tests turn."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.http.limits import MINUTE, SECOND, ConcurrencyLimit, RateLimit


class Clock:
    """Nanoseconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 5 * MINUTE

    def __call__(self) -> int:
        return self.now


@settings(deadline=None, derandomize=True)
@given(
    rate=st.integers(1, 5000),
    gaps=st.lists(st.one_of(st.just(0), st.integers(0, SECOND), st.integers(0, 2 * MINUTE)), max_size=300),
)
def test_no_window_lets_through_more_than_its_share_and_a_full_bucket(rate: int, gaps: list[int]) -> None:
    clock = Clock()
    limit, accepted = RateLimit(clock), []
    for gap in gaps:
        clock.now += gap
        if not limit.take("a", rate):
            accepted.append(clock.now)
    for i, first in enumerate(accepted):
        for j in range(i, len(accepted)):
            # requests <= burst + rate * t, without fractions
            assert (j - i + 1 - rate) * MINUTE <= rate * (accepted[j] - first)


@settings(deadline=None, derandomize=True)
@given(rate=st.integers(1, 300), gaps=st.lists(st.integers(0, 3 * SECOND), min_size=1, max_size=60))
def test_a_refused_client_gets_in_after_the_seconds_it_was_told_and_no_second_earlier(
    rate: int, gaps: list[int]
) -> None:
    clock = Clock()
    limit = RateLimit(clock)
    while not limit.take("a", rate):
        pass
    for gap in gaps:
        clock.now += gap
        seconds = limit.take("a", rate)
        if seconds:
            refused_at = clock.now
            clock.now = refused_at + (seconds - 1) * SECOND
            assert seconds == 1 or limit.take("a", rate) == 1
            clock.now = refused_at + seconds * SECOND
            assert limit.take("a", rate) == 0


def test_a_rested_client_may_ask_for_a_minutes_requests_at_once() -> None:
    limit = RateLimit(Clock())
    assert [limit.take("a", 7) for _ in range(8)] == [0] * 7 + [9]


def test_a_steady_client_within_its_rate_is_never_refused() -> None:
    clock = Clock()
    limit = RateLimit(clock)
    for _ in range(500):
        clock.now += MINUTE // 90
        assert limit.take("a", 90) == 0


def test_clients_do_not_share_a_bucket() -> None:
    limit = RateLimit(Clock())
    assert limit.take("a", 1) == 0 and limit.take("a", 1) > 0
    assert limit.take("b", 1) == 0


def test_memory_is_bounded_and_idle_clients_are_forgotten() -> None:
    clock = Clock()
    limit = RateLimit(clock, max_clients=100)
    for number in range(1000):
        limit.take(f"client {number}", 60)
    assert len(limit) == 100
    clock.now += 2 * MINUTE
    for _ in range(100):
        limit.take("the only one left", 1000)
    assert len(limit) == 1


def test_a_client_has_so_many_open_requests_at_most_and_leaves_no_trace() -> None:
    limit = ConcurrencyLimit()
    for _ in range(2):
        assert not limit.is_full("a", 2)
        limit.enter("a")
    assert limit.is_full("a", 2) and not limit.is_full("b", 2)
    limit.leave("a")
    assert not limit.is_full("a", 2)
    limit.leave("a")
    assert len(limit) == 0


def test_a_request_that_ends_twice_is_a_mistake_of_ours() -> None:
    limit: Any = ConcurrencyLimit()
    with pytest.raises(AssertionError):
        limit.leave("a")
