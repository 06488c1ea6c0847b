"""Tables of the page: scores, rungs, costs."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from ray_jobs.report.charts import Rows, finite
from ray_jobs.report.dataset_page import counted, table
from ray_jobs.report.svg import number
from ray_jobs.report.verdict import closed_share, won_by_tie
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
    SUBJECT_PARTS,
    TARGET,
    VOTES,
    Winner,
)


@dataclass(frozen=True)
class TrialCost:
    """Cost of a trial.

    Attributes:
        steps: all computed steps, including those after the last measured rung.
        measured_steps: steps up to its last measured rung.
        seconds: wall time in seconds, including evaluation.
        device_hours: hours times workers' devices.
        saved_steps: steps between its stop and the end of the ladder; 0 if it reached the end.
    """

    trial_id: str
    steps: int
    measured_steps: int
    seconds: float
    device_hours: float
    saved_steps: int = 0


@dataclass(frozen=True)
class Spent:
    """Cost of a search, one row per trial.

    Attributes:
        price: price of a device hour, if known.
        other_steps: steps of trainings without a measured rung: failed trials, or the refit on all folds.
    """

    trials: Sequence[TrialCost]
    price: float | None = None
    other_steps: int = 0


def scores(winner: Winner, results: Rows) -> list[tuple[str, str, str]]:
    """Rows of the table of scores: name, value, meaning."""
    chosen = "the lowest of all rungs"
    if won_by_tie(winner, results):
        chosen = "within the error of the lowest of all rungs, with fewer steps"
    samples, share = winner.num_samples, closed_share(winner)
    again = winner.test_reads > 1
    when = "measured after the search" if again else "measured once, after the search"

    def value(key: str, digits: int = 1) -> str:
        found, error = winner.value_of(key)
        return number(found, digits, error)

    rows = [
        (
            "Base model, test",
            value("base_test_fid"),
            f"{samples} pictures of the model before fine-tuning, against real test pictures",
        ),
        (
            "Winner, test",
            value("test_fid"),
            f"{samples} pictures of the winner, same captions and seeds; {when}",
        ),
        (
            "Real pictures, test",
            value("test_floor_fid"),
            f"the floor: {samples} real training pictures against the same test pictures; at this count"
            " no model can be expected to reach 0",
        ),
        *(
            [
                (
                    "Real pictures through the autoencoder, test",
                    value("reachable_test_fid"),
                    "the floor that this model can reach: the same training pictures, encoded and decoded",
                )
            ]
            if winner.reachable_test_fid is not None
            else []
        ),
        (
            "Share closed",
            "–" if share is None else f"{share:.0%}",
            "(base − winner) / (base − real pictures), on the test split"
            + (
                ""
                if winner.corrected_test is None
                else ", by the corrected FID, of which real pictures have 0"
            ),
        ),
        ("Base model, validation", value("base_validation_fid"), "the dashed line of the chart"),
    ]
    ranked = f"the score that the search ranked by: {chosen}, so slightly optimistic"
    if winner.ranked_by != FID:
        name, digits = winner.measure
        title = f"{name[0].upper()}{name[1:]}, validation: winner"
        rows.append(("Winner, validation", value("validation_fid"), "of the same pictures as the next score"))
        rows.append((title, value(f"validation_{winner.ranked_by}", digits), ranked))
    else:
        rows.append(("Winner, validation", value("validation_fid"), ranked))
    others = (
        (
            "test_subject",
            2,
            "Subject score, test",
            "likeness to the photos, and what was lost for it; 0 at best, 1 or more for the base",
        ),
        (
            "test_corrected_fid",
            1,
            "Corrected FID, test",
            "FID without the bias of the number of pictures; 0: as real pictures",
        ),
        (
            "test_spread",
            2,
            "Spread, test",
            "variance of the features over that of real ones; a smaller one lowers FID of few pictures",
        ),
        ("test_kid", 4, "KID, test", "kernel distance on the same pictures, not biased by their number"),
        ("test_mind", 1, "MIND, test", "sliced Wasserstein distance on the same pictures, hardly biased"),
        (
            "test_preference",
            2,
            "Preference gap, test",
            "how much less the reward model likes the pictures than the real ones of their captions",
        ),
        (
            "test_target",
            3,
            "Distance to the target, test",
            "1 - cosine of each edit to the picture that it should be, in features; 0 at best",
        ),
        (
            "test_control",
            3,
            "Control score, test",
            "mean of the corrected FID and of the next score, as shares of the base's FID and of its own",
        ),
        (
            "test_disagreement",
            3,
            "Disagreement with control images, test",
            "how far control images of the pictures are from those given; 0: equal, 1: nothing alike",
        ),
        (
            "test_votes",
            3,
            "Wrong votes, test",
            "share of held-out votes that the implicit rewards order wrongly; 0.5: no better than before",
        ),
        (
            "test_earlier_votes",
            3,
            "Wrong earlier votes, test",
            "the same of earlier rounds' votes, which were not trained on here; above 0.5: they are lost",
        ),
        (
            "test_outside",
            1,
            "Change outside of the edit, test",
            "mean difference from the target, of 255 levels, where the picture was to stay as it is",
        ),
        ("test_fid_2", 2, "Second network, test", "Fréchet distance in the second feature network"),
    )
    for key, digits, name, meaning in others:
        for whose, prefix in (("base", "base_"), ("winner", "")):
            if finite(winner, prefix + key) is not None:
                rows.append((f"{name}: {whose}", value(prefix + key, digits), meaning))
    if winner.unedited_test_target is not None:
        title = "Distance to the target, test: pictures as they were"
        unedited = "the first reference in place of the edit: what a model has that changes nothing"
        rows.append((title, value("unedited_test_target", 3), unedited))
    return rows


# Heading, field and decimal places.
Columns = list[tuple[str, str, int]]
RANKING = {key: (name, key, digits) for key, (name, digits) in MEASURES.items()}
SCORES: Columns = [
    *(RANKING[SUBJECT], *((part.replace("_", " "), part, 2) for part in SUBJECT_PARTS)),
    *(
        RANKING[CORRECTED],
        RANKING[FID],
        ("spread", "spread", 2),
        ("near copies", "near_copies", 2),
        RANKING[KID],
        RANKING[MIND],
        RANKING[PREFERENCE],
        RANKING[TARGET],
        RANKING[VOTES],
        ("outside", "outside", 1),
        RANKING[CONTROL],
        (DISAGREEMENT, DISAGREEMENT, BESIDE[DISAGREEMENT].digits),
    ),
    ("second network", "fid_2", 2),
]


def _with_values(columns: Columns, rows: Rows, always: frozenset[str]) -> Columns:
    """Return the columns that some row has a value in, and those that are always shown."""
    return [
        each for each in columns if each[1] in always or any(finite(row, each[1]) is not None for row in rows)
    ]


def rungs_table(results: Rows) -> str:
    """Table of every rung with all its measures; columns without a value are omitted."""
    columns = [*SCORES, ("training loss", "train_loss", 4), ("validation loss", "validation_loss", 4)]
    columns += [("images/s", "images_per_second", 1)]
    shown = _with_values(columns, results, frozenset({FID, "train_loss", "images_per_second"}))
    rows = [
        (
            f"{row.learning_rate:g}",
            f"{row.step:,}",
            *(number(finite(row, key), digits, finite(row, f"{key}_error")) for _, key, digits in shown),
            row.trial_id,
        )
        for row in sorted(results, key=lambda row: (row.learning_rate, row.step))
    ]
    return table(("learning rate", "step", *(head for head, _, _ in shown), "trial"), rows, "numbers rungs")


def guidance_table(tried: Rows, winner: Winner) -> str:
    """Table of the guidance scales tried on the best rung of each trial; empty if there are none."""
    if not tried:
        return ""
    chosen = winner.trial_id, winner.step, winner.guidance_scale
    shown = _with_values(SCORES, tried, frozenset({FID}))
    rows = [
        (
            row.trial_id,
            f"{row.step:,}",
            f"{row.guidance_scale:g}"
            + (" ★" if (row.trial_id, row.step, row.guidance_scale) == chosen else ""),
            *(number(finite(row, key), digits, finite(row, f"{key}_error")) for _, key, digits in shown),
        )
        for row in tried
    ]
    head = ("trial", "step", "guidance scale", *(each[0] for each in shown))
    return "<h3>Guidance scales</h3>" + table(head, rows, "numbers")


def costs_section(spent: Spent | None) -> str:
    """Section of each trial's cost, and the saving from stopping it; empty without data."""
    if spent is None or not spent.trials:
        return ""
    head = ["trial", "steps computed", "up to a scored rung", "time", "device hours"]
    head += (["cost"] if spent.price is not None else []) + ["steps saved", "device hours saved"]
    rows = [
        _cost(
            each.trial_id,
            each.steps,
            each.measured_steps,
            each.seconds,
            each.device_hours,
            each.saved_steps,
            _saved(each),
            spent.price,
        )
        for each in spent.trials
    ]
    sums = (
        sum(each.steps for each in spent.trials),
        sum(each.measured_steps for each in spent.trials),
        sum(each.seconds for each in spent.trials),
        sum(each.device_hours for each in spent.trials),
        sum(each.saved_steps for each in spent.trials),
        sum(map(_saved, spent.trials)),
    )
    rows.append(_cost("all", *sums, spent.price))
    steps, measured, saved = sums[0], sums[1], sums[4]
    other = spent.other_steps
    without = f" {counted(other, 'more step')} computed by trainings without a scored rung." if other else ""
    words = (
        f"{counted(steps, 'step')} computed, {measured:,} up to the last scored rungs: a trial keeps"
        f" training while the rung that stops it is scored.{without} Stopping trials early saved {saved:,},"
        f" which is {saved / max(steps + saved, 1):.0%} of the whole grid. Saved hours assume each trial's"
        " own speed."
    )
    return f'<h2>Costs</h2><p class="note">{escape(words)}</p>' + table(head, rows, "numbers sums")


def _saved(trial: TrialCost) -> float:
    """Device hours that the saved steps would have taken at the trial's own speed."""
    return trial.saved_steps * trial.device_hours / trial.steps if trial.steps else 0.0


def _cost(
    name: str,
    steps: int,
    measured: int,
    seconds: float,
    hours: float,
    saved_steps: int,
    saved_hours: float,
    price: float | None,
) -> list[str]:
    clock = f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}"
    cost = [] if price is None else [f"{price * hours:.2f}"]
    return [
        name,
        f"{steps:,}",
        f"{measured:,}",
        clock,
        f"{hours:.2f}",
        *cost,
        f"{saved_steps:,}",
        f"{saved_hours:.2f}",
    ]
