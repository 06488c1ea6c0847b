"""The order of training rows: every row once an epoch, the same for any number of workers, found by step."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_jobs.data.feeding.order import JoinedOrder, Order, Part, Step, rows_of_rank


def steps_of(order: Order | JoinedOrder, first: int, last: int) -> list[Step]:
    return [step for window in order.windows(first, last) for step in order.steps(window)]


def rows_of(steps: list[Step]) -> list[tuple[int, int]]:
    return [(int(part), int(row)) for step in steps for part, row in step.rows]


sizes = st.lists(st.integers(1, 40), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(sizes, st.integers(1, 16), st.integers(1, 80), st.integers(0, 5), st.integers(1, 60))
def test_any_step_is_found_without_those_before(
    rows: list[int], batch_size: int, window_rows: int, seed: int, first: int
) -> None:
    order = Order([Part(n) for n in rows], batch_size=batch_size, window_rows=window_rows, seed=seed)
    whole, resumed = steps_of(order, 1, 70), steps_of(order, first, 70)
    assert [step.step for step in whole] == list(range(1, 71))
    assert [step.step for step in resumed] == list(range(first, 71))
    for one, other in zip(whole[first - 1 :], resumed, strict=True):
        assert (one.rows == other.rows).all()


@settings(max_examples=60, deadline=None)
@given(sizes, st.integers(1, 16), st.integers(1, 80), st.integers(0, 5))
def test_every_epoch_holds_every_row_once(
    rows: list[int], batch_size: int, window_rows: int, seed: int
) -> None:
    order = Order([Part(n) for n in rows], batch_size=batch_size, window_rows=window_rows, seed=seed)
    size = sum(rows)
    seen = rows_of(steps_of(order, 1, -(-3 * size // batch_size)))
    everything = {(part, row) for part, n in enumerate(rows) for row in range(n)}
    for epoch in range(3):
        epoch_rows = seen[epoch * size : (epoch + 1) * size]
        assert set(epoch_rows) == everything and len(epoch_rows) == size


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 30), st.sampled_from("abc")), min_size=1, max_size=10),
    st.integers(1, 12),
    st.integers(1, 60),
)
def test_a_batch_is_of_one_bucket_and_no_row_is_ever_lost(
    parts: list[tuple[int, str]], batch_size: int, window_rows: int
) -> None:
    order = Order(
        [Part(n, bucket) for n, bucket in parts], batch_size=batch_size, window_rows=window_rows, seed=0
    )
    epochs = 2 * batch_size  # then every bucket has come out even, since its rows times this is a multiple
    steps = steps_of(order, 1, order.steps_before(epochs))
    for step in steps:
        assert {parts[int(part)][1] for part in step.rows[:, 0]} == {step.bucket}
    counts = Counter(rows_of(steps))
    assert set(counts.values()) == {epochs}
    assert len(counts) == sum(n for n, _ in parts)


def test_epochs_and_seeds_differ() -> None:
    parts = [Part(10)] * 5
    order = Order(parts, batch_size=10, window_rows=20, seed=0)
    seen = rows_of(steps_of(order, 1, 10))
    assert seen[:50] != seen[50:]
    assert seen != rows_of(steps_of(Order(parts, batch_size=10, window_rows=20, seed=1), 1, 10))
    assert seen == rows_of(steps_of(Order(parts, batch_size=10, window_rows=20, seed=0), 1, 10))


def test_the_shuffle_is_as_good_as_its_window_says() -> None:
    """With w parts in a window, a batch of B holds about B / w rows of a part; a full shuffle, B / p."""
    parts = [Part(64)] * 64
    order = Order(parts, batch_size=32, window_rows=8 * 64, seed=0)
    steps = steps_of(order, 1, order.steps_before(4))
    different = np.mean([len(set(step.rows[:, 0].tolist())) for step in steps])
    assert different > 0.8 * 8
    # Over epochs any two parts meet: windows are made of other parts each time.
    together = {
        (min(one, other), max(one, other))
        for step in steps
        for one in step.rows[:, 0].tolist()
        for other in step.rows[:, 0].tolist()
    }
    assert len(together) > 0.3 * 64 * 63 / 2


def test_a_mixture_has_the_shares_of_its_weights_and_leaves_no_row_out() -> None:
    parts = [Part(40, "a", 0), Part(260, "a", 1), Part(40, "b", 1)]
    order = Order(parts, batch_size=8, window_rows=64, seed=0, weights={0: 3, 1: 1})
    assert order.shares() == pytest.approx({0: 0.75, 1: 0.25})
    seen = Counter(rows_of(steps_of(order, 1, order.steps_before(4))))
    assert len(seen) == 340
    drawn = sum(count for (part, _), count in seen.items() if part == 0)
    assert drawn / sum(seen.values()) == pytest.approx(0.75, abs=0.02)
    small = [count for (part, _), count in seen.items() if part == 0]
    assert max(small) - min(small) <= 2


def test_without_weights_sources_have_the_shares_of_their_rows() -> None:
    order = Order([Part(30, "a", 0), Part(10, "a", 1)], batch_size=4, window_rows=8, seed=0)
    assert order.shares() == {0: 0.75, 1: 0.25}


def test_fewer_rows_than_a_batch_fill_it_by_coming_several_times() -> None:
    order = Order([Part(5)], batch_size=8, window_rows=64, seed=0)
    counts = Counter(rows_of(steps_of(order, 1, 5)))
    assert sorted(counts.values()) == [8] * 5


def test_no_rows_are_an_error() -> None:
    with pytest.raises(ValueError, match="no rows"):
        Order([Part(0)], batch_size=1, window_rows=1, seed=0)


@given(st.integers(1, 100), st.integers(1, 9))
def test_every_rank_gets_its_share_of_a_step_to_within_one_row(rows: int, world_size: int) -> None:
    shares = [rows_of_rank(rows, world_size, rank) for rank in range(world_size)]
    assert [row for share in shares for row in share] == list(range(rows))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def joined(
    training: list[int], of_class: list[int], batch: int, class_batch: int, window: int
) -> JoinedOrder:
    return JoinedOrder(
        Order([Part(n) for n in training], batch_size=batch, window_rows=window, seed=0),
        Order([Part(n) for n in of_class], batch_size=class_batch, window_rows=window, seed=1),
        window_rows=window,
    )


@settings(max_examples=60, deadline=None)
@given(sizes, sizes, st.integers(1, 9), st.integers(1, 9), st.integers(1, 80), st.integers(1, 60))
def test_joined_orders_take_the_rows_of_both_and_any_step_is_found_without_those_before(
    training: list[int], of_class: list[int], batch: int, class_batch: int, window: int, first: int
) -> None:
    order = joined(training, of_class, batch, class_batch, window)
    assert order.batch_size == batch + class_batch
    whole, resumed = steps_of(order, 1, 70), steps_of(order, first, 70)
    assert [step.step for step in whole] == list(range(1, 71))
    for one, other in zip(whole[first - 1 :], resumed, strict=True):
        assert (one.step, one.epoch, one.bucket) == (other.step, other.epoch, other.bucket)
        assert (one.rows == other.rows).all()
    alone = steps_of(order.first, 1, 70), steps_of(order.second, 1, 70)
    for step, one, other in zip(whole, *alone, strict=True):
        assert (step.rows[:batch] == one.rows).all()
        assert (step.rows[batch:] - [len(training), 0] == other.rows).all()


def test_every_class_row_comes_round_however_few_the_training_rows_are() -> None:
    order = joined([3], [5, 6], 4, 2, 1000)
    steps = steps_of(order, 1, 44)
    counts = Counter(rows_of(steps))
    assert {counts[0, row] for row in range(3)} == {44 * 4 // 3, 44 * 4 // 3 + 1}
    assert [counts[part, row] for part, n in ((1, 5), (2, 6)) for row in range(n)] == [44 * 2 // 11] * 11
    # A window goes on over many epochs of a small set, so that its few files are not read for each step.
    assert len(list(order.windows(1, 44))) == 1


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_workers_share_a_joined_step_without_changing_it(world_size: int) -> None:
    order = joined([5], [9], 3, 2, 20)
    for step in steps_of(order, 1, 20):
        dealt = [step.rows[rows_of_rank(order.batch_size, world_size, rank)] for rank in range(world_size)]
        assert (np.concatenate(dealt) == step.rows).all()
