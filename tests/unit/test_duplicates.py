"""Every pair of near duplicates is found once, and the rules on them hold however the set grows."""

from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_jobs.config import ConfigError
from ray_jobs.data.curation import duplicates
from ray_jobs.data.curation.duplicates import Pairs, least_cost, make_tables, near_pairs
from ray_jobs.data.curation.resolution import resolve

NO_PAIRS = np.empty((0, 2), np.int64)
FIXED = settings(deadline=None, derandomize=True, max_examples=60)
Mode = Literal["drop", "keep"]
Set = tuple[np.ndarray, np.ndarray]
modes = st.sampled_from(["drop", "keep"])


def clustered(num: int, seed: int, max_flips: int = 10) -> Set:
    """Hashes and colours some bits and steps away from a few centres; often copies, often just too far."""
    draw = np.random.default_rng(seed)
    hashes = draw.choice(draw.integers(0, 2**64, 4, dtype=np.uint64) * draw.integers(0, 2, 4, np.uint64), num)
    for row in range(num):
        flipped = draw.choice(64, draw.integers(0, max_flips + 1), replace=False)
        hashes[row] ^= np.bitwise_or.reduce(np.uint64(1) << flipped.astype(np.uint64), initial=np.uint64(0))
    centres = draw.integers(0, 256, (2, 48))
    colours = centres[draw.integers(0, 2, num)] + draw.integers(0, 4, (num, 1)) * draw.integers(-9, 9, 48)
    return hashes, np.clip(colours, 0, 255).astype(np.uint8)


def alike(hashes: np.ndarray, colours: np.ndarray, distance: int, colour: float) -> np.ndarray:
    """bool, N x N: near duplicates by their definition."""
    bits = np.bitwise_count(hashes[:, None] ^ hashes)
    difference = np.abs(colours[:, None].astype(int) - colours).sum(axis=2)
    return (bits <= distance) & (difference <= colour * 48 * 255)


def pairs_of(matrix: np.ndarray) -> np.ndarray:
    return np.argwhere(np.triu(matrix, 1))


def with_copies(found: Pairs, num: int) -> np.ndarray:
    """bool, N x N: what `found` says of each two pictures, copies included."""
    first = np.arange(num)
    first[found.copies[:, 1]] = found.copies[:, 0]
    near = np.eye(num, dtype=bool)
    near[tuple(found.near.T)] = near[tuple(found.near.T[::-1])] = True
    return near[first][:, first]


@st.composite
def sets(draw: Any) -> Set:
    return clustered(draw(st.integers(0, 60)), draw(st.integers(0, 2**32)), draw(st.sampled_from([2, 6, 10])))


@FIXED
@given(sets(), st.integers(0, 8), st.sampled_from([0.001, 0.02, 1.0]), st.sampled_from([None, 1, 2, 3]))
def test_clustered_near_duplicates_are_those_of_the_definition(
    pictures: Set, distance: int, colour: float, agreeing: int | None
) -> None:
    found = near_pairs(*pictures, distance=distance, colour=colour, agreeing=agreeing)
    matrix = alike(*pictures, distance, colour)
    np.testing.assert_array_equal(with_copies(found, len(matrix)), matrix)
    assert (found.near[:, 0] < found.near[:, 1]).all() and (np.diff(found.near[:, 0]) >= 0).all()
    assert len(found.near) == len(np.unique(found.near, axis=0))


@pytest.mark.parametrize("distance", range(9))
def test_near_duplicates_among_random_hashes_are_those_of_the_definition(distance: int) -> None:
    draw = np.random.default_rng(distance)
    hashes = draw.integers(0, 2**64, 600, dtype=np.uint64)
    for bits in range(12):  # of each ten pictures, the second differs from the first in `bits` bits
        flipped = np.array([draw.choice(64, bits, replace=False) for _ in range(5)], np.uint64)
        hashes[50 * bits + 1 : 50 * bits + 50 : 10] = hashes[50 * bits : 50 * bits + 50 : 10] ^ (
            np.uint64(1) << flipped
        ).sum(axis=1, dtype=np.uint64)
    colours = np.full((600, 48), 100, np.uint8)
    colours[:, 0] += np.arange(600, dtype=np.uint8) % 7  # no copies
    found = near_pairs(hashes, colours, distance=distance, colour=0.1)
    assert len(found.copies) == 0 and len(found.near) == 5 * (distance + 1)
    np.testing.assert_array_equal(found.near, pairs_of(alike(hashes, colours, distance, 0.1)))


def test_a_pair_is_as_near_as_the_thresholds_allow_and_no_further() -> None:
    hashes = np.array([0, 0b1111], np.uint64)
    colours = np.array([[100] * 48, [110] * 48], np.uint8)
    at_threshold = near_pairs(hashes, colours, distance=4, colour=10 / 255)
    assert at_threshold.near.tolist() == [[0, 1]]
    assert len(near_pairs(hashes, colours, distance=3, colour=10 / 255).near) == 0
    assert len(near_pairs(hashes, colours, distance=4, colour=9.9 / 255).near) == 0


def test_a_hundred_thousand_copies_of_a_picture_cost_no_square_of_pairs() -> None:
    hashes, colours = np.zeros(100_000, np.uint64), np.full((100_000, 48), 7, np.uint8)
    colours[70_000:] = 8
    found = near_pairs(hashes, colours, distance=4, colour=0.04)
    assert found.near.tolist() == [[0, 70_000]]
    assert (found.copies[:, 0] == np.where(found.copies[:, 1] < 70_000, 0, 70_000)).all()
    assert len(found.copies) == 99_998


def test_comparing_in_many_small_steps_finds_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = clustered(200, seed=1)
    expected = near_pairs(*pictures, distance=4, colour=0.04)
    monkeypatch.setattr(duplicates, "CANDIDATES_AT_ONCE", 50)
    found = near_pairs(*pictures, distance=4, colour=0.04)
    assert len(found.near) > 400
    np.testing.assert_array_equal(found.near, expected.near)


def test_more_pairs_than_a_task_can_hold_are_an_error_that_names_the_settings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(duplicates, "MAX_PAIRS", 1000)
    colours = np.random.default_rng(0).integers(0, 2, (50, 48), np.uint8)
    with pytest.raises(ConfigError, match="duplicate_distance"):
        near_pairs(np.zeros(50, np.uint64), colours, distance=4, colour=0.04)


@pytest.mark.parametrize("distance", range(9))
@pytest.mark.parametrize("agreeing", [1, 2, 3])
def test_two_hashes_within_the_distance_belong_to_exactly_one_table(distance: int, agreeing: int) -> None:
    draw = np.random.default_rng(distance)
    tables = make_tables(distance, agreeing)
    for num_bits in range(distance + 1):
        differing = np.uint64(sum(1 << int(bit) for bit in draw.choice(64, num_bits, replace=False)))
        belongs = [
            differing & table.key == 0 and all(differing & mask != 0 for mask in table.before)
            for table in tables
        ]
        assert sum(belongs) == 1


def test_tables_grow_in_number_and_in_bits_with_the_set() -> None:
    assert [least_cost(0, num) for num in (100, 10**8)] == [1, 1]
    assert least_cost(4, 1000) == 1
    assert [least_cost(4, num) for num in (10**6, 10**7)] == [2, 2]
    tables = make_tables(4, 2)
    assert len(tables) == 15 and min(table.key.bit_count() for table in tables) == 20


def decided(matrix: np.ndarray, own: np.ndarray, mode: Mode) -> tuple[list[bool], list[int], list[int]]:
    """The rules as they are written, of every two pictures: kept, split, matched."""
    kept, split, matched = [True] * len(own), own.tolist(), [-1] * len(own)
    for later in range(len(own)):
        deciding = [earlier for earlier in range(later) if matrix[earlier, later] and kept[earlier]]
        if deciding:
            splits = {split[each] for each in deciding}
            kept[later] = mode == "keep" and len(splits) == 1
            split[later] = split[deciding[0]]
            matched[later] = deciding[0]
    return kept, split, matched


@FIXED
@given(sets(), modes, st.integers(0, 2**32))
def test_pictures_are_decided_on_by_their_earlier_kept_near_duplicates(
    pictures: Set, mode: Mode, seed: int
) -> None:
    matrix = alike(*pictures, 4, 0.02)
    own = np.random.default_rng(seed).integers(0, 3, len(matrix))
    result = resolve(len(matrix), near_pairs(*pictures, distance=4, colour=0.02), mode, own)
    kept, split, matched = decided(matrix, own, mode)
    assert result.kept.tolist() == kept and result.matched.tolist() == matched
    assert result.split[result.kept].tolist() == [
        each for each, stays in zip(split, kept, strict=True) if stays
    ]


@FIXED
@given(sets(), st.integers(0, 2**32))
def test_no_two_kept_pictures_are_near_duplicates_or_lie_in_two_splits(pictures: Set, seed: int) -> None:
    matrix = alike(*pictures, 4, 0.02)
    own = np.random.default_rng(seed).integers(0, 3, len(matrix))
    pairs = near_pairs(*pictures, distance=4, colour=0.02)
    dropped = resolve(len(matrix), pairs, "drop", own)
    assert len(pairs_of(matrix[dropped.kept][:, dropped.kept])) == 0
    assert (dropped.split[dropped.kept] == own[dropped.kept]).all()
    assert matrix[np.arange(len(own)), dropped.matched][~dropped.kept].all()

    kept = resolve(len(matrix), pairs, "keep", own)
    left, right = pairs_of(matrix & kept.kept & kept.kept[:, None]).T
    assert (kept.split[left] == kept.split[right]).all()


@FIXED
@given(sets(), modes, st.integers(0, 2**32), st.integers(0, 60))
def test_pictures_that_are_added_move_no_earlier_one(
    pictures: Set, mode: Mode, seed: int, former: int
) -> None:
    hashes, colours = pictures
    own = np.random.default_rng(seed).integers(0, 3, len(hashes))
    num = min(former, len(hashes))
    before = resolve(num, near_pairs(hashes[:num], colours[:num], distance=4, colour=0.02), mode, own[:num])
    after = resolve(len(hashes), near_pairs(hashes, colours, distance=4, colour=0.02), mode, own)
    for earlier, later in zip(vars(before).values(), vars(after).values(), strict=True):
        np.testing.assert_array_equal(earlier, later[:num])


def test_between_near_duplicates_of_two_splits_a_picture_is_set_aside() -> None:
    pairs = Pairs(near=np.array([[0, 2], [1, 2], [2, 3]]), copies=NO_PAIRS)
    result = resolve(5, pairs, "keep", ["train", "test", "train", "validation", "train"])
    assert result.kept.tolist() == [True, True, False, True, True]
    assert result.split[3] == "validation"  # its only near duplicate is set aside
    assert result.matched.tolist() == [-1, -1, 0, -1, -1]


def test_a_copy_of_a_dropped_picture_is_dropped_with_it() -> None:
    pairs = Pairs(near=np.array([[0, 1]]), copies=np.array([[1, 2]]))
    result = resolve(3, pairs, "drop", ["train", "train", "test"])
    assert result.kept.tolist() == [True, False, False]
    assert result.matched.tolist() == [-1, 0, 0]
