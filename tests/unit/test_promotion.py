"""Which measurements may be compared, and when one beats the other."""

import math
from dataclasses import replace

import pytest

from ray_jobs.registry.promotion import Measured, Paired, Result, objection, objection_to_first

CHAMPION = Measured(20.0, 0.3, num_samples=96, feature_network="inception@sha256:7ff4", data="9f" * 32)


@pytest.mark.parametrize(("fid", "error", "promoted"), [(19.4, 0.4, True), (19.6, 0.4, False)])
def test_the_difference_must_exceed_the_error_of_a_difference(
    fid: float, error: float, promoted: bool
) -> None:
    # The error of a difference of 0.3 and 0.4 is 0.5.
    assert (objection(replace(CHAMPION, fid=fid, error=error), CHAMPION) is None) == promoted


def test_without_errors_a_lower_fid_is_enough_and_an_equal_one_is_not() -> None:
    champion = replace(CHAMPION, error=None)
    assert objection(replace(champion, fid=19.9), champion) is None
    assert objection(champion, champion) is not None


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"feature_network": "dino@sha256:00"}, "feature network dino@sha256:00, the champion's inception"),
        ({"num_samples": 5000}, "number of samples 5000, the champion's 96"),
        ({"data": "00" * 32}, "data 000000000000, the champion's 9f9f9f9f9f9f"),
    ],
)
def test_what_was_measured_otherwise_is_not_compared_and_the_difference_is_named(
    change: dict[str, object], named: str
) -> None:
    assert named in (objection(replace(CHAMPION, fid=1.0, **change), CHAMPION) or "")  # type: ignore[arg-type]


def test_another_training_picture_does_not_keep_versions_apart_but_another_test_picture_does() -> None:
    champion = replace(CHAMPION, test="aa" * 32)
    better = replace(champion, fid=10.0, data="00" * 32)
    assert objection(better, champion) is None
    other = objection(replace(better, test="bb" * 32), champion)
    assert "test split bbbbbbbbbbbb, the champion's aaaaaaaaaaaa" in (other or "")
    # A champion of before the test split had a digest is compared by the digest of all data.
    assert "data 000000000000" in (objection(better, CHAMPION) or "")
    assert objection(replace(better, data=CHAMPION.data), CHAMPION) is None


def test_where_both_drew_the_same_captions_the_error_is_that_of_the_paired_difference() -> None:
    new = replace(CHAMPION, fid=19.7)
    assert objection(new, CHAMPION) is not None
    assert objection(new, CHAMPION, Paired(1, {"fid": 0.1})) is None
    assert "by more than the error 0.31 of the difference in pairs" in (
        objection(new, CHAMPION, Paired(1, {"fid": 0.31})) or ""
    )


RANKED = replace(
    CHAMPION,
    ranked_by="corrected_fid",
    others={"corrected_fid": Result(14.0, 0.3, 30.0), "kid": Result(0.02, 0.001, 0.03)},
)


def test_the_score_that_ranked_the_search_decides() -> None:
    """FID of few pictures rewards a smaller variety, so a lower one may be a worse model's."""
    worse = replace(RANKED, fid=10.0, others={"corrected_fid": Result(15.0, 0.4)})
    assert objection(worse, RANKED) == (
        "its test corrected FID 15.00 ± 0.40 does not beat the champion's 14.00 ± 0.30 by more than the "
        "error 0.50"
    )
    better = replace(RANKED, fid=30.0, others={"corrected_fid": Result(13.6, 0.4)})
    assert objection(better, RANKED) is not None
    assert objection(better, RANKED, Paired(1, {"fid": 9.0, "corrected_fid": 0.1})) is None
    kid = replace(RANKED, ranked_by="kid", others={"kid": Result(0.0195, 0.001)})
    assert "KID 0.01950 ± 0.00100 does not beat the champion's 0.02000" in (objection(kid, RANKED) or "")


def test_a_score_that_one_of_them_lacks_does_not_decide() -> None:
    new = replace(RANKED, fid=10.0, others={"corrected_fid": Result(15.0)})
    assert objection(new, CHAMPION) is None, "by FID, as in earlier releases"
    assert objection(replace(RANKED, ranked_by="mind", fid=10.0), RANKED) is None
    # Its correction comes from training pictures.
    same_test = replace(RANKED, test="aa" * 32)
    assert objection(replace(new, test="aa" * 32, data="00" * 32), same_test) is None


def test_the_first_version_must_beat_the_base_by_the_score_that_ranked() -> None:
    assert objection_to_first(replace(RANKED, base_fid=1.0)) is None
    worse = replace(RANKED, base_fid=99.0, others={"corrected_fid": Result(31.0, None, 30.0)})
    assert objection_to_first(worse) == "its test corrected FID 31.00 does not beat the base model's 30.00"


def test_the_first_version_must_beat_the_base() -> None:
    assert objection_to_first(replace(CHAMPION, base_fid=20.1)) is None
    assert objection_to_first(CHAMPION) is None, "of before the base's score was recorded"
    assert "does not beat the base model's 20.00" in (
        objection_to_first(replace(CHAMPION, base_fid=20.0)) or ""
    )
    assert "not a number" in (objection_to_first(replace(CHAMPION, fid=math.nan)) or "")


def test_a_champion_without_a_record_is_not_replaced_unasked() -> None:
    assert "no record" in (objection(CHAMPION, None) or "")


def test_a_score_that_is_no_number_never_wins_and_always_loses() -> None:
    diverged = replace(CHAMPION, fid=math.nan)
    assert "not a number" in (objection(diverged, CHAMPION) or "")
    assert objection(CHAMPION, diverged) is None


def test_a_version_that_edits_must_also_beat_changing_nothing() -> None:
    """By more than the error of the difference in pairs, as first version and beside a champion."""
    edits = replace(
        CHAMPION,
        ranked_by="target",
        others={"target": Result(0.30, 0.02, 0.60)},
        unedited=Result(0.34, 0.03),
    )
    champion = replace(edits, others={"target": Result(0.40, 0.02, 0.60)})
    for unedited, is_served in ((Result(0.34, 0.03), True), (Result(0.32, 0.03), False), (None, True)):
        new = replace(edits, unedited=unedited)
        for against in (objection_to_first(new), objection(new, champion)):
            assert (against is None) == is_served
    worse = objection_to_first(replace(edits, unedited=Result(0.2, None))) or ""
    assert worse == (
        "its edits, 0.3000 ± 0.0200 from their targets on the test split, do not beat changing nothing: the "
        "pictures as they were are 0.2000 from them, not further"
    )
    near = objection(replace(edits, unedited=Result(0.32, 0.03)), champion) or ""
    assert near.endswith(
        "0.3200 from them, not further by more than the error 0.0300 of the difference in pairs"
    )
    by_fid = replace(edits, ranked_by="fid", base_fid=50.0, unedited=Result(0.1, 0.0))
    assert objection_to_first(by_fid) is None, "targets were not what the search went by"
