"""Pictures keep their split and fold, whatever else is in the set."""

from collections.abc import Sequence

import numpy as np
import pytest

from ray_jobs.data.curation.splits import (
    Shares,
    are_floor_candidates,
    content_digest,
    even_folds,
    folds_of,
    split_of,
    splits_of,
    stratified_splits,
)
from ray_jobs.run.split import SPLITS, SplitName

SHARES = Shares(seed=0, validation=0.15, test=0.15)
DIGESTS = [content_digest(str(number).encode()) for number in range(4000)]
NAMES = [digest.encode() for digest in DIGESTS]


def stratified(strata: Sequence[str], known: Sequence[SplitName | None]) -> list[SplitName]:
    """Splits of pictures by their strata; `known` has the splits of those assigned before."""
    names = sorted(set(strata))
    codes = np.array([names.index(each) for each in strata])
    before = np.array([-1 if each is None else SPLITS.index(each) for each in known])
    return [SPLITS[code] for code in stratified_splits(codes, names, SHARES, before)]


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


def test_many_pictures_are_split_as_each_alone() -> None:
    assert [SPLITS[code] for code in splits_of(NAMES, SHARES)] == [split_of(each, SHARES) for each in DIGESTS]


def test_the_floor_has_twice_as_many_training_pictures_as_there_are_test_pictures() -> None:
    splits = [split_of(digest, SHARES) for digest in DIGESTS]
    training = [name for name, split in zip(NAMES, splits, strict=True) if split == "train"]
    assert are_floor_candidates(training, SHARES).sum() > 2 * splits.count("test")


@pytest.mark.parametrize("size", [20, 57, 400])
def test_every_stratum_is_split_in_the_same_shares_to_within_about_a_picture(size: int) -> None:
    strata = ["apple", "pear", "plum"] * size
    splits = stratified(strata, [None] * len(strata))
    for stratum in ("apple", "pear", "plum"):
        inside = [split for split, of in zip(splits, strata, strict=True) if of == stratum]
        assert abs(inside.count("test") - 0.15 * size) <= 2
        assert abs(inside.count("validation") - 0.15 * size) <= 2


def test_pictures_added_anywhere_move_none_that_are_known() -> None:
    strata = ["apple" if number % 3 else "pear" for number in range(200)]
    before = stratified(strata, [None] * 200)
    known = [each for split in before for each in (None, split)]
    after = stratified([of for of in strata for _ in range(2)], known)
    assert after[1::2] == before
    assert abs(after[::2].count("test") - 0.15 * 200) <= 5


def test_pictures_appended_move_none_even_if_nothing_is_known() -> None:
    strata = ["apple" if number % 3 else "pear" for number in range(300)]
    assert stratified(strata, [None] * 300)[:200] == stratified(strata[:200], [None] * 200)


def test_folds_are_even_and_independent_of_the_splits() -> None:
    folds = folds_of(NAMES, 0, 5)
    assert (abs(np.bincount(folds, minlength=5) - 800) < 100).all()
    test = folds[splits_of(NAMES, SHARES) == SPLITS.index("test")]
    assert (abs(np.bincount(test, minlength=5) - len(test) / 5) < 40).all()


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
