"""Promotion: decide if a new version may replace the champion. Pure: two measurements in, a sentence out."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from ray_jobs.metrics.votes import DRIFT
from ray_jobs.run.records import CORRECTED, EARLIER_VOTES, FID, MEASURES, PREFERENCE, SUBJECT, TARGET, VOTES


class Result(NamedTuple):
    """A score on the test split.

    Attributes:
        error: standard error; None if it was not estimated, which counts as 0.
        base: score of the base model on the same pictures; None if it was not recorded.
    """

    value: float
    error: float | None = None
    base: float | None = None


@dataclass(frozen=True)
class Measured:
    """Scores on the test split, and the conditions that must be equal to compare them with others.

    Attributes:
        error, base_fid: of the FID, as in `Result`.
        data: digest of the prepared data, including the training pictures.
        test: digest of the pictures and captions of the test split; None for a version registered without
            it, for which `data` is compared instead.
        ranked_by: which score the search went by, one of `MEASURES`.
        others: the scores beside FID that can rank, by their names in `MEASURES`.
        preference_model: identity of the reward model, if there is one.
        unedited: distance to the targets of the pictures as they were, before an edit; its error is that of
            the edits' difference from it, in pairs.
        name: of the version, as name@3; "" if it is not registered.
        begins_from: base, and version or adapter, from which the weights were trained; "" if not recorded.
    """

    fid: float
    error: float | None
    num_samples: int
    feature_network: str
    data: str
    test: str | None = None
    base_fid: float | None = None
    ranked_by: str = FID
    others: Mapping[str, Result] = field(default_factory=dict)
    preference_model: str | None = None
    unedited: Result | None = None
    begins_from: str = ""
    name: str = ""

    def result(self, measure: str) -> Result | None:
        """Return a score; None if it was not recorded."""
        return Result(self.fid, self.error, self.base_fid) if measure == FID else self.others.get(measure)

    def told(self, measure: str) -> str:
        """Format a score that was recorded, with its error."""
        found = self.result(measure)
        assert found is not None
        error = "" if found.error is None else f" ± {_number(measure, found.error)}"
        return _number(measure, found.value) + error


@dataclass(frozen=True)
class Paired:
    """Paired comparison of a new version with a champion on the same captions and noise.

    Attributes:
        champion: version number of that champion.
        errors: standard errors of the differences of their test scores, by names in `MEASURES`.
    """

    champion: int
    errors: Mapping[str, float]


def _number(measure: str, value: float) -> str:
    return f"{value:.{MEASURES[measure].digits + 1}f}"


def compared_by(new: Measured, champion: Measured) -> str:
    """Return the score that decides between two versions: the new one's `ranked_by` if both have it, or FID.

    The corrected FID depends on training pictures, by which it is corrected, and is compared only where they
    are the same; the preference gap only where the reward model is; the subject score, which is relative to
    what the weights were trained from, only where that is; votes only where it is the champion.
    """
    measure = new.ranked_by
    if measure == VOTES:
        return VOTES if champion.name and f"={champion.name} " in f"{new.begins_from} " else FID
    if measure == SUBJECT and new.begins_from != champion.begins_from:
        return FID
    if measure == PREFERENCE and new.preference_model != champion.preference_model:
        return FID
    if measure == CORRECTED and new.data != champion.data:
        return FID
    return measure if new.result(measure) and champion.result(measure) else FID


def objection(new: Measured, champion: Measured | None, paired: Paired | None = None) -> str | None:
    """Return the reason why `new` must not replace the champion, or None if it may.

    The error of the difference of two independent estimates is the root of the sum of their squared errors.
    Two versions scored on the same captions share the sampling of these, which is at least half of either
    error. So if both versions' pictures are available, the error is that of the paired difference.

    Args:
        champion: measurement of the champion; None if it was not measured by this program.
        paired: paired comparison of the two; None if it is not available.
    """
    if champion is None:
        return "the champion has no record of how it was measured"
    pairs = {
        "feature network": (new.feature_network, champion.feature_network),
        "number of samples": (new.num_samples, champion.num_samples),
    }
    if new.test and champion.test:
        pairs["test split"] = new.test[:12], champion.test[:12]
    else:  # registered before the test split had its own digest
        pairs["data"] = new.data[:12], champion.data[:12]
    differ = [
        f"{what} {mine}, the champion's {other}" for what, (mine, other) in pairs.items() if mine != other
    ]
    if differ:
        return f"it cannot be compared with the champion: {'; '.join(differ)}"
    measure = compared_by(new, champion)
    if measure == VOTES:
        return _objection_of_votes(new, champion, paired)
    mine, theirs = new.result(measure), champion.result(measure)
    assert mine is not None and theirs is not None
    name = MEASURES[measure].name
    if math.isnan(mine.value):
        return f"its test {name} is not a number"
    error = math.hypot(mine.error or 0.0, theirs.error or 0.0)
    in_pairs = ""
    if paired and measure in paired.errors:
        error, in_pairs = paired.errors[measure], " of the difference in pairs"
    if math.isnan(theirs.value) or theirs.value - mine.value > error:
        return _objection_of_unedited(new)
    margin = f" by more than the error {_number(measure, error)}{in_pairs}" if error else ""
    return (
        f"its test {name} {new.told(measure)} does not beat the champion's {champion.told(measure)}{margin}"
    )


def _objection_of_unedited(new: Measured) -> str | None:
    """Return the reason why an editing version that was ranked by targets must not be served, or None.

    It must come nearer to the targets than the pictures that it is given, by more than the error.
    """
    edits, before = new.result(TARGET), new.unedited
    if new.ranked_by != TARGET or edits is None or before is None:
        return None
    error = before.error or 0.0
    if before.value - edits.value > error:
        return None
    margin = f" by more than the error {_number(TARGET, error)} of the difference in pairs" if error else ""
    return (
        f"its edits, {new.told(TARGET)} from their targets on the test split, do not beat changing nothing: "
        f"the pictures as they were are {_number(TARGET, before.value)} from them, not further{margin}"
    )


CERTAIN = 1.96  # standard errors by which a share of votes must differ from one half


def _objection_of_votes(new: Measured, champion: Measured, paired: Paired | None) -> str | None:
    """Return the reason why a version that was trained on votes must not replace the one that it began from.

    Its implicit rewards, relative to the champion, must order more than half of the held-out votes as people
    did, and no less than half of earlier votes; and its FID must not be worse.
    """
    votes, earlier = new.result(VOTES), new.result(EARLIER_VOTES)
    assert votes is not None
    if not votes.value + CERTAIN * (votes.error or 0.0) < 0.5:
        return (
            f"it orders a share of {new.told(VOTES)} of the held-out votes wrongly, which is not certainly "
            "less than the champion's 0.5"
        )
    if earlier and not earlier.value - CERTAIN * (earlier.error or 0.0) <= 0.5:
        return (
            f"it orders a share of {new.told(EARLIER_VOTES)} of earlier rounds' votes wrongly, more than the "
            "champion's 0.5: the new votes contradict them"
        )
    error = math.hypot(new.error or 0.0, champion.error or 0.0)
    if paired and FID in paired.errors:
        error = paired.errors[FID]
    if not new.fid - champion.fid <= DRIFT * error:
        return (
            f"its test FID {new.told(FID)} is worse than the champion's {champion.told(FID)} by more than "
            f"{DRIFT:g} times the error {_number(FID, error)} of the difference"
        )
    return None


def objection_to_first(new: Measured) -> str | None:
    """Return the reason why a name's first version must not be served (no better than the base), or None."""
    measure = new.ranked_by if (found := new.result(new.ranked_by)) and found.base is not None else FID
    found, name = new.result(measure), MEASURES[measure].name
    assert found is not None
    if math.isnan(found.value):
        return f"its test {name} is not a number"
    if found.base is None or math.isnan(found.base) or found.value < found.base:
        return _objection_of_unedited(new)
    return (
        f"its test {name} {new.told(measure)} does not beat the base model's {_number(measure, found.base)}"
    )
