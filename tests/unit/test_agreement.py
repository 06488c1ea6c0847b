"""Krippendorff's alpha, against his own example and values worked out by hand."""

import pytest

from ray_jobs.metrics.agreement import krippendorff_alpha

# Krippendorff (2011), section C: four observers, twelve units, with missing values.
OBSERVERS = (
    "1 2 3 3 2 1 4 1 2 . . .",
    "1 2 3 3 2 2 4 1 2 5 . 3",
    ". 3 3 3 2 3 4 2 2 5 1 .",
    "1 2 3 3 2 4 4 1 2 5 1 .",
)


def test_his_own_example() -> None:
    rows = [row.split() for row in OBSERVERS]
    units = [[each for each in unit if each != "."] for unit in zip(*rows, strict=True)]
    assert krippendorff_alpha(units) == pytest.approx(0.743, abs=5e-4)


def test_by_hand() -> None:
    # Coincidences of a and b: 1 + 1 of the last unit; n_a = 3, n_b = 3: 1 - 5 * 2 / (36 - 18).
    assert krippendorff_alpha(["aa", "bb", "ab"]) == pytest.approx(1 - 5 * 2 / 18)


def test_agreement_is_one_and_disagreement_below_chance() -> None:
    assert krippendorff_alpha(["aa", "bbb", "a"]) == 1
    found = krippendorff_alpha(["ab", "ab"])
    assert found is not None and found < 0


def test_what_says_nothing_has_no_alpha() -> None:
    assert krippendorff_alpha(["a", "b"]) is None
    assert krippendorff_alpha(["aa", "aa"]) is None
