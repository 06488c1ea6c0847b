"""Pictures keep their split and fold, whatever else is in the set."""

import pytest

from ray_jobs.data.curation.splits import (
    Shares,
    content_digest,
    even_folds,
    fold_of,
    is_floor_candidate,
    split_of,
    stratified_splits,
)
from ray_jobs.run.split import SplitName

SHARES = Shares(seed=0, validation=0.15, test=0.15)
DIGESTS = [content_digest(str(number).encode()) for number in range(4000)]


def test_a_split_depends_on_the_bytes_alone_and_shares_come_out() -> None:
    splits = [split_of(digest, SHARES) for digest in DIGESTS]
    assert splits == [split_of(content_digest(str(n).encode()), SHARES) for n in range(4000)]
    assert abs(splits.count("train") / 4000 - 0.7) < 0.03
    assert abs(splits.count("test") / 4000 - 0.15) < 0.03


def test_another_seed_splits_independently() -> None:
    test = [d for d in DIGESTS if split_of(d, SHARES) == "test"]
    other = Shares(seed=1, validation=0.15, test=0.15)
    again = [d for d in test if split_of(d, other) == "test"]
    assert len(again) / len(test) < 0.3


def test_the_floor_has_twice_as_many_training_pictures_as_there_are_test_pictures() -> None:
    floor = [d for d in DIGESTS if split_of(d, SHARES) == "train" and is_floor_candidate(d, SHARES)]
    assert len(floor) > 2 * sum(split_of(d, SHARES) == "test" for d in DIGESTS)


@pytest.mark.parametrize("size", [20, 57, 400])
def test_every_stratum_is_split_in_the_same_shares_to_within_about_a_picture(size: int) -> None:
    strata = ["apple", "pear", "plum"] * size
    splits = stratified_splits(DIGESTS[: len(strata)], strata, SHARES, {})
    for stratum in ("apple", "pear", "plum"):
        inside = [split for split, of in zip(splits, strata, strict=True) if of == stratum]
        assert abs(inside.count("test") - 0.15 * size) <= 2
        assert abs(inside.count("validation") - 0.15 * size) <= 2


def test_pictures_added_anywhere_move_none_that_are_known() -> None:
    strata = ["apple" if number % 3 else "pear" for number in range(200)]
    before = stratified_splits(DIGESTS[:200], strata, SHARES, {})
    known: dict[str, SplitName] = dict(zip(DIGESTS[:200], before, strict=True))
    grown = [digest for pair in zip(DIGESTS[1000:1200], DIGESTS[:200], strict=True) for digest in pair]
    after = stratified_splits(grown, [of for of in strata for _ in range(2)], SHARES, known)
    found = dict(zip(grown, after, strict=True))
    assert {digest: found[digest] for digest in known} == known
    added = [found[digest] for digest in grown if digest not in known]
    assert abs(added.count("test") - 0.15 * len(added)) <= 5


def test_pictures_appended_move_none_even_if_nothing_is_known() -> None:
    strata = ["apple" if number % 3 else "pear" for number in range(300)]
    before = stratified_splits(DIGESTS[:200], strata[:200], SHARES, {})
    assert stratified_splits(DIGESTS[:300], strata, SHARES, {})[:200] == before


def test_folds_are_even_and_independent_of_the_splits() -> None:
    folds = [fold_of(digest, 0, 5) for digest in DIGESTS]
    assert all(abs(folds.count(fold) - 800) < 100 for fold in range(5))
    test = [fold for fold, digest in zip(folds, DIGESTS, strict=True) if split_of(digest, SHARES) == "test"]
    assert all(abs(test.count(fold) - len(test) / 5) < 40 for fold in range(5))


@pytest.mark.parametrize("seed", range(5))
def test_folds_of_few_pictures_are_as_even_as_groups_and_captions_allow(seed: int) -> None:
    cats, dogs = DIGESTS[:7], DIGESTS[7:11]
    groups = [cats[0], *cats[:6], *dogs]  # the first two cats are near duplicates
    captions = ["cat"] * 7 + ["dog"] * 4
    folds = even_folds(groups, captions, seed, 4)
    assert folds[0] == folds[1]
    assert sorted(folds[7:]) == [0, 1, 2, 3]
    assert sorted(folds.count(fold) for fold in range(4)) == [2, 3, 3, 3]
    assert sorted(folds[:7].count(fold) for fold in range(4)) == [1, 2, 2, 2]


def test_folds_of_few_pictures_do_not_depend_on_their_order() -> None:
    folds = even_folds(DIGESTS[:9], ["cat"] * 9, 0, 4)
    turned = even_folds(DIGESTS[8::-1], ["cat"] * 9, 0, 4)
    assert folds == turned[::-1]
