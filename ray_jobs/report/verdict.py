"""Results in sentences, with notes on their reliability."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ray_jobs.report.charts import Rows, finite
from ray_jobs.report.dataset_page import counted
from ray_jobs.report.svg import describe_settings, number
from ray_jobs.run.records import (
    BESIDE,
    CONTROL,
    CORRECTED,
    DISAGREEMENT,
    FID,
    KID,
    MEASURES,
    MIND,
    PREFERENCE,
    SUBJECT,
    TARGET,
    VOTES,
    Remembered,
    RungRow,
    Winner,
)

LESS_VARIED = 0.95  # spread over the base's, below which pictures became more alike
UNBIASED = (CORRECTED, KID)  # scores without the bias of few pictures
# What the score that ranks has of this bias.
BIAS = {
    CORRECTED: "The corrected FID, which ranks here, does not have this bias.",
    KID: "KID, which ranks here, does not have this bias.",
    MIND: "MIND, which ranks here, hardly rewards that; its values, too, fall with the number of pictures.",
    PREFERENCE: "The preference gap, which ranks here, does not depend on their number.",
    VOTES: "The share of wrong votes, which ranks here, does not depend on their number.",
    TARGET: "The distance to the target, which ranks here, does not depend on their number.",
    CONTROL: "The control score, which ranks here, takes the corrected FID, which does not have it.",
    SUBJECT: "The subject score, which ranks here, is made for few pictures.",
}


def closed_share(winner: Winner) -> float | None:
    """Share of the distance from the base to real pictures that the winner closed, on the test split.

    By the corrected FID, of which real pictures have 0, if there is one, else by FID.

    1: as near as other real pictures; 0: no better than the base; negative: worse. None if the base is
    already as near as real pictures, within its standard error, or a score is not finite.
    """
    base, tuned, floor = winner.base_test_fid, winner.test_fid, winner.test_floor_fid
    error = winner.base_test_fid_error or 0.0
    if winner.corrected_test:
        (base, tuned), floor = winner.corrected_test, 0.0
        error = winner.base_test_corrected_fid_error or 0.0
    if not all(map(math.isfinite, (base, tuned, floor))) or base - floor <= error:
        return None
    return (base - tuned) / (base - floor)


def headline(winner: Winner) -> str:
    """State the result in one sentence."""
    who = f"A learning rate of {describe_settings(winner)} for {counted(winner.step, 'step')}"
    if winner.guidance_scale is not None:
        who += f", drawn with a guidance scale of {winner.guidance_scale:g},"
    if winner.ranked_by == SUBJECT:
        digits = winner.measure.digits
        score = number(winner.validation_subject, digits, winner.validation_subject_error)
        base = number(winner.base_validation_subject, digits)
        unseen = f" over {len(winner.folds)} folds" if winner.folds else ""
        return (
            f"{who} won with a subject score of {score}{unseen}; the base model's is {base}, the best is 0."
        )
    if winner.ranked_by == TARGET and winner.test_target is not None:
        return f"{who} won: {of_targets(winner)}."
    if winner.ranked_by == CONTROL and winner.test_disagreement is not None:
        return f"{who} won: {of_control(winner)}."
    if winner.ranked_by == VOTES and winner.test_votes is not None:
        digits = winner.measure.digits
        wrong = number(winner.test_votes, digits, winner.test_votes_error)
        return f"{who} won: it orders a share of {wrong} of the held-out votes wrongly, the base model 0.5."
    share = closed_share(winner)
    if share is None:
        return f"{who} won; within its error, the base model is already as near to real pictures as they are."
    if share < 0:
        return f"{who} won, but on the test split it is further from real pictures than the base model."
    return f"{who} closed {share:.0%} of the distance from the base model to real pictures on the test split."


def of_targets(winner: Winner) -> str:
    """State how near the winner's edits come to their targets on the test split."""
    digits = MEASURES[TARGET].digits
    after = number(winner.test_target, digits, winner.test_target_error)
    before = number(winner.base_test_target, digits, winner.base_test_target_error)
    told = f"its edits are {after} from their targets on the test split, those of the base model {before}"
    if winner.unedited_test_target is not None:
        told += f", and the pictures as they were {number(winner.unedited_test_target, digits)}"
    return told


def of_control(winner: Winner) -> str:
    """State how well the winner's pictures follow control images on the test split, and their FID."""
    name, digits = BESIDE[DISAGREEMENT]
    after = number(winner.test_disagreement, digits, winner.test_disagreement_error)
    before = number(winner.base_test_disagreement, digits, winner.base_test_disagreement_error)
    told = f"its {name} of the test split is {after}, that of the base model {before}"
    key = FID if winner.corrected_test is None else CORRECTED
    name, digits = MEASURES[key]
    own, of_base = (number(winner.value_of(f"{whose}test_{key}")[0], digits) for whose in ("", "base_"))
    return f"{told}; its {name} is {own}, the base model's {of_base}"


def beginning(begins_from: Mapping[str, str]) -> str:
    """State what training began from, where that is no plain base; empty if it is one.

    Args:
        begins_from: as `Winner.begins_from`.
    """
    told = ""
    if version := begins_from.get("base"):
        told = f"The base model is {version} of the registry."
    if adapter := begins_from.get("adapter"):
        told += (
            f" Training went on from the adapter {adapter}: the base model in all scores is the base with it."
        )
    return told.strip()


def forgotten(found: Remembered) -> str:
    """State in one line how well the pictures of an earlier run are drawn before and after the training."""
    name, digits = MEASURES[found.measure]
    before = number(found.before, digits, found.before_error)
    after = number(found.after, digits, found.after_error)
    told = f"The pictures of {found.run}: {name} {before} before, {after} after this training"
    if found.base is not None:
        told += f"; {number(found.base, digits, found.base_error)} for the base without either"
    if found.change is None:
        return f"{told}; without errors, nothing says whether they differ."
    change = number(abs(found.change), digits, found.change_error)
    if abs(found.change) <= (found.change_error or 0.0):
        return f"{told}. In pairs of pictures they differ by {change}, within the error."
    way = "something was forgotten" if found.change > 0 else "nothing was forgotten"
    return f"{told}. In pairs of pictures it is {change} {'worse' if found.change > 0 else 'better'}: {way}."


class Note(NamedTuple):
    """A sentence; `alert` marks one that weakens the result."""

    text: str
    alert: bool = True


def notes(winner: Winner, results: Rows, enough_samples: int) -> list[Note]:
    """Collect caveats for reading the ranking; empty if there are none.

    Args:
        enough_samples: minimum number of pictures per score for a meaningful ranking by FID.

    Raises:
        ValueError: the rungs' second scores are from different networks.
    """
    begun = beginning(winner.begins_from)
    found: list[Note | None] = [Note(begun, alert=False) if begun else None]
    found += [_too_few(winner, results, enough_samples), _variety(winner)]
    found += [_ties(winner, results), _trade_offs(results)]
    if (network := second_network(results)) is not None:
        found.append(_agreement(winner, results, network))
    for each in winner.remembered:
        worse = each.change is not None and each.change > (each.change_error or 0.0)
        found.append(Note(forgotten(each), alert=worse))
    if winner.test_reads > 1:
        times = f"The test split of this run was used {winner.test_reads} times"
        found.append(Note(f"{times}: if any choice was based on it, its scores are optimistic."))
    return [note for note in found if note]


def second_network(results: Rows) -> str | None:
    """Feature network of `fid_2`; None if no row has a score from a second network.

    Raises:
        ValueError: there are several networks, whose scores must not be compared.
    """
    scored = [row for row in results if finite(row, "fid_2") is not None]
    networks = {str(row.feature_network_2) for row in scored}
    if len(networks) > 1:
        raise ValueError(
            f"feature_network_2: {', '.join(sorted(networks))}: scores of different networks cannot be"
            " compared; measure all rungs with one"
        )
    return networks.pop() if networks else None


def _too_few(winner: Winner, results: Rows, enough: int) -> Note | None:
    samples = winner.num_samples
    if samples >= enough:
        return None
    if winner.ranked_by != FID:
        return Note(
            f"{counted(samples, 'picture')} per score is fewer than {enough:,}: FID is biased at that count"
            f" and rewards a smaller variety. {BIAS[winner.ranked_by]}",
            alert=False,
        )
    shown = any(finite(row, "kid") is not None for row in results)
    kid = " KID, shown beside it, does not have this bias." if shown else ""
    return Note(
        f"{counted(samples, 'picture')} per score is fewer than {enough:,}: FID is biased at that count, and"
        f" the ranking of close candidates may be noise.{kid}"
    )


def _variety(winner: Winner) -> Note | None:
    """Warn if FID fell while pictures became more alike and no unbiased score says that they are better."""
    spreads = finite(winner, "base_test_spread"), finite(winner, "test_spread")
    if None in spreads or winner.test_fid >= winner.base_test_fid:
        return None
    base, now = (each or 0.0 for each in spreads)
    unbiased = [(finite(winner, f"base_test_{name}"), finite(winner, f"test_{name}")) for name in UNBIASED]
    if now > LESS_VARIED * base or any(b is not None and w is not None and w < b for b, w in unbiased):
        return None
    return Note(
        f"FID is lower than the base's, but the pictures vary less ({now:.2f} of real pictures' variance, the"
        f" base {base:.2f}), and no score without the bias of few pictures is lower: variety was lost, and"
        " perhaps nothing gained. Compare the pictures."
    )


def won_by_tie(winner: Winner, results: Rows) -> bool:
    """Return whether another rung has a lower score, within the error, and took more steps."""
    chosen = _row_of(winner, results)
    return chosen is not None and bool(finite(chosen, "behind"))


def _ties(winner: Winner, results: Rows) -> Note | None:
    """Explain why the winner is not the rung with the lowest score, if so."""
    chosen = _row_of(winner, results)
    lowest = _lowest([row for row in results if finite(row, "score") is not None], "score")
    if chosen is None or lowest is None or not won_by_tie(winner, results):
        return None
    assert chosen.behind is not None
    name, digits = chosen.measure
    apart = number(chosen.behind, digits, chosen.behind_error)
    return Note(
        f"The lowest {name} is that of {_name(lowest)}. On the same noise it is {apart} below the"
        " winner's, which is within the error of the difference, so the rung with fewer steps won.",
        alert=False,
    )


def front(rows: Rows, keys: Sequence[str]) -> list[RungRow]:
    """Return the rows that no other row beats: that are lower in one of the scores `keys`, or equal in all.

    Rows without one of the scores are left out.
    """
    points = [(row, [finite(row, key) for key in keys]) for row in rows]
    known = [(row, [each for each in point if each is not None]) for row, point in points]
    known = [(row, point) for row, point in known if len(point) == len(keys)]
    return [
        row
        for row, point in known
        if not any(
            other != point and all(a <= b for a, b in zip(other, point, strict=True)) for _, other in known
        )
    ]


def _trade_offs(results: Rows) -> Note | None:
    """Name the rungs between which a distance and the preference gap do not decide, if there are several."""
    distance = CORRECTED if all(finite(row, CORRECTED) is not None for row in results) else FID
    best = front(results, (distance, PREFERENCE))
    if len(best) < 2:
        return None
    of_each = ((row, distance, PREFERENCE) for row in sorted(best, key=lambda row: getattr(row, distance)))
    told = "; ".join(
        f"{_name(row)} ({', '.join(number(getattr(row, key), MEASURES[key].digits) for key in keys)})"
        for row, *keys in of_each
    )
    names = f"{MEASURES[distance].name} and {MEASURES[PREFERENCE].name}"
    return Note(f"By {names} together no rung is better than one of these: {told}.", alert=False)


def _agreement(winner: Winner, results: Rows, network: str) -> Note | None:
    """State whether the second network would have chosen the same rung."""
    scored = [row for row in results if None not in (finite(row, "score"), finite(row, "fid_2"))]
    first, second = (_lowest(scored, key) for key in ("score", "fid_2"))
    if first is None or second is None:
        return None
    mine, other = (name.split("@")[0] for name in (winner.feature_network, network))
    if first.place == second.place:
        return Note(f"Both feature networks, {mine} and {other}, choose the same winner.", alert=False)
    return Note(
        f"The feature networks disagree about the winner: {mine} chooses {_name(first)}, {other}"
        f" chooses {_name(second)}. Compare the pictures."
    )


def _row_of(winner: Winner, results: Rows) -> RungRow | None:
    wanted = winner.trial_id, winner.step
    return next((row for row in reversed(results) if row.place == wanted), None)


def _lowest(rows: Rows, key: str) -> RungRow | None:
    return min(rows, key=lambda row: (getattr(row, key), row.step), default=None)


def _name(row: RungRow) -> str:
    return f"{describe_settings(row)} at {counted(row.step, 'step')}"
