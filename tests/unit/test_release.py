"""A version that was trained on votes replaces the champion it began from, or is held back and says why."""

from dataclasses import replace

import pytest

from ray_jobs.registry.promotion import Measured, Paired, Result, compared_by, objection
from ray_jobs.run.records import EARLIER_VOTES, FID, VOTES

CHAMPION = Measured(20.0, 1.0, 96, "inception", "data", "test", ranked_by=FID, name="emoji@3")
NEW = Measured(
    20.5,
    1.0,
    96,
    "inception",
    "data",
    "test",
    ranked_by=VOTES,
    others={VOTES: Result(0.40, 0.04, 0.5)},
    begins_from="base=sd base_revision= begins_from_base= begins_from_adapter=emoji@3",
)


def with_votes(**others: Result) -> Measured:
    return replace(NEW, others={**NEW.others, **others})


def test_votes_decide_where_the_champion_is_what_the_version_began_from() -> None:
    assert compared_by(NEW, CHAMPION) == VOTES
    assert compared_by(NEW, replace(CHAMPION, name="emoji@4")) == FID
    assert compared_by(NEW, replace(CHAMPION, name="moji@3")) == FID
    assert objection(NEW, CHAMPION) is None


@pytest.mark.parametrize(
    ("new", "reason"),
    [
        (with_votes(**{VOTES: Result(0.44, 0.04, 0.5)}), "not certainly less than the champion's 0.5"),
        (with_votes(**{VOTES: Result(float("nan"), 0.04, 0.5)}), "not certainly less"),
        (with_votes(**{EARLIER_VOTES: Result(0.60, 0.04, 0.5)}), "the new votes contradict them"),
        (replace(NEW, fid=24.0), "worse than the champion's"),
        (replace(NEW, test="other"), "cannot be compared"),
    ],
)
def test_what_holds_a_version_back(new: Measured, reason: str) -> None:
    found = objection(new, CHAMPION)
    assert found and reason in found


def test_earlier_votes_within_their_error_hold_nothing_back() -> None:
    assert objection(with_votes(**{EARLIER_VOTES: Result(0.56, 0.04, 0.5)}), CHAMPION) is None


def test_fid_is_compared_by_the_error_of_pairs_where_there_is_one() -> None:
    assert objection(NEW, CHAMPION, Paired(3, {FID: 0.2}))
    assert objection(NEW, CHAMPION, Paired(3, {FID: 0.3})) is None
