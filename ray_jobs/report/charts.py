"""Charts of a search: scores over steps, a map of learning rate by steps, training and validation loss."""

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from ray_jobs.report.svg import WIDTH, Chart, Curve, Point, describe_settings, framed, line_chart, number
from ray_jobs.run.records import (
    BESIDE,
    CONTROL,
    CORRECTED,
    DISAGREEMENT,
    KID,
    MEASURES,
    MIND,
    PREFERENCE,
    SUBJECT,
    SUBJECT_PARTS,
    TARGET,
    VOTES,
    Measure,
    RungRow,
    Winner,
    paired_error,
)

NUMBERS = "All numbers are in the table “Every rung in numbers”."
# Units of the map's view box.
CELL_HEIGHT, MAP_LEFT, MAP_TOP, MAP_FOOT = 34, 66, 8, 46
# Opacity of the best and worst cell; text stays readable on both, in light and dark mode.
STRONGEST, FAINTEST = 0.55, 0.05
LOWEST = 1e-3  # values of the heat map are at least this share of the highest, to have a logarithm
SURE = 2  # standard errors; larger differences are not attributed to chance

Rows = Sequence[RungRow]


def finite(record: RungRow | Winner, key: str) -> float | None:
    """Return a record's value; None if it is missing or not finite."""
    value = getattr(record, key, None)
    return value if value is not None and math.isfinite(value) else None


def trials_of(results: Rows) -> list[tuple[str, str, list[RungRow]]]:
    """List (label, trial, its rows in step order) of every trial, by learning rate.

    The label has the trial's learning rate and other searched settings, or its name if they change during the
    trial.

    Of a rung that was measured twice (in a resumed search) only the last measurement counts.
    """
    trials: dict[str, dict[int, RungRow]] = {}
    for row in results:
        trials.setdefault(row.trial_id, {})[row.step] = row
    found = [(trial, [rungs[step] for step in sorted(rungs)]) for trial, rungs in trials.items()]
    found.sort(key=lambda each: (each[1][0].learning_rate, each[0]))
    return [(_label(trial, rungs), trial, rungs) for trial, rungs in found]


def _label(trial: str, rungs: Rows) -> str:
    labels = {describe_settings(row) for row in rungs}
    return labels.pop() if len(labels) == 1 else trial


def score_curves(winner: Winner, results: Rows, key: str) -> list[Curve]:
    """One curve per trial of `key` with `<key>_error`; trials that ended before the last rung are stopped."""
    last_rung = max((row.step for row in results), default=0)
    curves = []
    for color, (label, trial, rungs) in enumerate(trials_of(results)):
        points = points_of(rungs, key)
        diverged = any(finite(row, "fid") is None for row in rungs)
        stopped = rungs[-1].step < last_rung or diverged
        star = winner.step if trial == winner.trial_id else None
        curves.append(Curve(label, points, color, stopped, star))
    return curves


def points_of(rungs: Rows, key: str) -> list[Point]:
    """Points of `key` with `<key>_error`, at the rungs that have a value."""
    found = [(row.step, finite(row, key), finite(row, f"{key}_error")) for row in rungs]
    return [Point(step, value, error) for step, value, error in found if value is not None]


def fid_chart(winner: Winner, results: Rows) -> str:
    """Validation FID over steps, one curve per trial, with the base model as a dashed line."""
    chart = Chart(
        name="fid",
        title="Validation FID over training steps",
        description=f"One line per learning rate, one point per rung; lower is better. {NUMBERS}",
        unit="FID (lower is better)",
        digits=1,
        level=("base model", winner.base_validation_fid),
    )
    return line_chart(chart, score_curves(winner, results, "fid"))


def corrected_chart(winner: Winner, results: Rows) -> str:
    """Validation's corrected FID over steps; empty if no row has one."""
    title = "Validation FID without the bias of few pictures"
    return _ranking_chart(winner, results, CORRECTED, title, "Corrected FID, 0 for pictures as real ones")


def kid_chart(winner: Winner, results: Rows) -> str:
    """Validation KID over steps; empty if no row has one."""
    title = "Validation KID over training steps"
    return _ranking_chart(winner, results, KID, title, "Kernel distance, unbiased for any number of pictures")


def mind_chart(winner: Winner, results: Rows) -> str:
    """Validation MIND over steps; empty if no row has one."""
    title = "Validation MIND over training steps"
    return _ranking_chart(winner, results, MIND, title, "Sliced Wasserstein distance of the same features")


def preference_chart(winner: Winner, results: Rows) -> str:
    """Validation's preference gap over steps; empty if no row has one."""
    title = "What the reward model prefers, over training steps"
    what = "How much less the pictures are liked than the real ones of their captions; below 0: more"
    return _ranking_chart(winner, results, PREFERENCE, title, what)


def target_chart(winner: Winner, results: Rows) -> str:
    """Validation's distance of edits to their targets over steps; empty if no row has one."""
    title = "Distance of edits to their targets, over training steps"
    return _ranking_chart(
        winner, results, TARGET, title, "1 - cosine of features; 0 for the targets themselves"
    )


def control_charts(winner: Winner, results: Rows) -> list[str]:
    """Validation's control score and disagreement over steps; none if no row has one."""
    together = "FID and disagreement together, as shares of the base's"
    apart = "How far control images of the pictures are from those given, 0 to 1"
    charts = [
        _ranking_chart(winner, results, CONTROL, "Control score over training steps", together),
        _ranking_chart(
            winner, results, DISAGREEMENT, "Disagreement with control images over training steps", apart
        ),
    ]
    return [each for each in charts if each]


def votes_chart(winner: Winner, results: Rows) -> str:
    """Share of validation's votes that are ordered wrongly, over steps; empty if no row has one."""
    title = "Held-out votes that the model orders wrongly, over training steps"
    return _ranking_chart(winner, results, VOTES, title, "Share of votes, 0.5 for a model like the reference")


def _ranking_chart(winner: Winner, results: Rows, measure: str, title: str, what: str) -> str:
    """Return a chart of a score that can rank, with the base's as a dashed line; empty if no row has it."""
    if all(finite(row, measure) is None for row in results):
        return ""
    name, digits = (MEASURES | BESIDE)[measure]
    base, _ = winner.value_of(f"base_validation_{measure}")
    chart = Chart(
        name=measure.replace("_", "-"),
        title=title,
        description=f"{what}; lower is better. {NUMBERS}",
        unit=f"{name} (lower is better)",
        digits=digits,
        level=None if base is None else ("base model", base),
    )
    return line_chart(chart, score_curves(winner, results, measure))


def subject_charts(winner: Winner, results: Rows) -> list[str]:
    """Subject score over steps, and its parts for every trial, the winner first; empty if no row has one."""
    title = "Subject score over training steps"
    what = "Likeness to photos that were not trained on, and what was lost for it: the sum of the parts below"
    if not (whole := _ranking_chart(winner, results, SUBJECT, title, what)):
        return []
    trials = sorted(trials_of(results), key=lambda each: each[1] != winner.trial_id)
    return [whole, *(_parts_chart(winner, number, *trial) for number, trial in enumerate(trials))]


def _parts_chart(winner: Winner, number: int, label: str, trial: str, rungs: Rows) -> str:
    """Parts of a trial's subject score over steps. Where one falls and another rises, training parts them."""
    star = winner.step if trial == winner.trial_id else None
    curves = []
    for color, (field, name) in enumerate(SUBJECT_PARTS.items()):
        if points := points_of(rungs, field):
            curves.append(Curve(name, points, color, False, star))
    chart = Chart(
        name=f"subject-parts-{number}",
        title=f"What training gains and loses: {label}",
        description=f"Parts of the subject score, each 0 at best and 1 at worst; lower is better. {NUMBERS}",
        unit="share (lower is better)",
        digits=2,
    )
    return line_chart(chart, curves)


def second_chart(winner: Winner, results: Rows, network: str) -> str:
    """Fréchet distance over steps in the second feature network, `network`."""
    chart = Chart(
        name="fid-2",
        title=f"The same pictures by {network.split('@')[0]}",
        description=f"Fréchet distance in the second network; only its ranking compares with FID. {NUMBERS}",
        unit="Fréchet distance (lower is better)",
        digits=2,
    )
    return line_chart(chart, score_curves(winner, results, "fid_2"))


def heat_map(winner: Winner, results: Rows) -> str:
    """Ranking score by learning rate (rows) and steps (columns); lower values have a stronger colour.

    A cell shows the best of several trials with its learning rate. Empty with fewer than two filled cells.
    """
    cells: dict[tuple[float, int], float] = {}
    for _, _, rungs in trials_of(results):
        for row in rungs:
            if (value := finite(row, "score")) is not None:
                place = row.learning_rate, row.step
                cells[place] = min(value, cells.get(place, math.inf))
    if len(cells) < 2:
        return ""
    rates = sorted({row.learning_rate for row in results}, reverse=True)
    steps = sorted({row.step for row in results})
    width = (WIDTH - MAP_LEFT - 4) / len(steps)
    best, measure = (winner.learning_rate, winner.step), results[-1].measure
    parts = []
    for line, rate in enumerate(rates):
        y = MAP_TOP + line * CELL_HEIGHT
        parts.append(f'<text x="{MAP_LEFT - 8}" y="{y + 21}" text-anchor="end">{rate:g}</text>')
        for column, step in enumerate(steps):
            x = MAP_LEFT + column * width
            parts.append(_cell(x, y, width, cells, (rate, step), (rate, step) == best, measure))
    foot = MAP_TOP + len(rates) * CELL_HEIGHT
    every = math.ceil(44 / width)  # label only columns with enough space
    parts += [
        f'<text x="{MAP_LEFT + (column + 0.5) * width:.1f}" y="{foot + 16}" text-anchor="middle">'
        f"{step:,}</text>"
        for column, step in enumerate(steps)
        if column % every == 0
    ]
    middle = (MAP_LEFT + WIDTH) / 2
    parts.append(f'<text x="{middle:g}" y="{foot + 36}" text-anchor="middle">training steps</text>')
    lower = f"the stronger the colour, the lower the {measure.name}; –: no value."
    note = f'<p class="note">Learning rate by steps; {lower}</p>'
    words = f"One cell per learning rate and step count, with its validation {measure.name}; "
    words += f"the winner is framed. {NUMBERS}"
    title = f"Validation {measure.name} by learning rate and steps"
    return framed("heat-map", title, words, "".join(parts), note, foot + MAP_FOOT)


def _cell(
    x: float,
    y: float,
    width: float,
    cells: dict[tuple[float, int], float],
    place: tuple[float, int],
    wins: bool,
    measure: Measure,
) -> str:
    value, low, high = cells.get(place), min(cells.values()), max(cells.values())
    gap = 1.5
    box = (
        f'x="{x + gap:.1f}" y="{y + gap:.1f}" width="{width - 2 * gap:.1f}" height="{CELL_HEIGHT - 2 * gap}"'
    )
    middle = f'x="{x + width / 2:.1f}" y="{y + 21}" text-anchor="middle"'
    if value is None:
        return f'<rect class="empty" {box} rx="4"/><text {middle}>–</text>'
    # Logarithmic, so that one diverged trial does not make all others look alike. A corrected FID or a KID
    # may be a little below 0.
    least = LOWEST * high if high > 0 else 1.0
    low, high, value_there = (math.log(max(each, least)) for each in (low, high, value))
    nearness = (high - value_there) / (high - low) if high > low else 1.0
    opacity = FAINTEST + (STRONGEST - FAINTEST) * nearness
    written = number(value, measure.digits)
    says = f"<title>{place[0]:g}, {place[1]:,} steps: {written}</title>"
    # A narrow cell has space for whole numbers only.
    shown = written if width >= 46 else f"{value:.0f}" if width >= 30 and measure.digits == 1 else ""
    frame = f'<rect class="frame" {box} rx="4"/>' if wins else ""
    return (
        f'<rect class="cell" fill-opacity="{opacity:.2f}" {box} rx="4">{says}</rect>{frame}'
        f'<text class="value" {middle}>{shown}</text>'
    )


class Rise(NamedTuple):
    """Difference between the validation loss of a trial's last rung and its lowest.

    Attributes:
        step: step of the rung with the lowest loss.
        by: the difference.
        error: standard error of `by` over the held-out rows, from the paired losses of each row; None if the
            rungs store only the mean.
    """

    step: int
    by: float
    error: float | None

    @property
    def is_clear(self) -> bool:
        """Return whether the rise exceeds chance."""
        return self.error is not None and self.by > SURE * self.error

    def __str__(self) -> str:
        lowest = f"Validation loss is lowest at {self.step:,} steps"
        if self.error is None:
            return f"{lowest} and higher at the last rung, possibly by chance."
        higher = f"higher by {self.by:.2g} ± {self.error:.1g}"
        if self.is_clear:
            return f"{lowest} and rises from there: at the last rung it is {higher}."
        return f"{lowest}; at the last rung it is {higher}, which may be chance."


def rise_of(rungs: Rows) -> Rise | None:
    """Rise of a trial's validation loss; None if its last rung is the lowest."""
    known = [row for row in rungs if finite(row, "validation_loss") is not None]
    lowest = min(known, key=_loss, default=None)
    if lowest is None or lowest.step == known[-1].step:
        return None
    error = paired_error(known[-1].validation_losses, lowest.validation_losses)
    return Rise(lowest.step, _loss(known[-1]) - _loss(lowest), error)


def _loss(row: RungRow) -> float:
    assert row.validation_loss is not None
    return row.validation_loss


def over_fitting_section(winner: Winner, results: Rows) -> str:
    """Section of losses, variety and near copies over steps of every trial, the winner first; empty without
    data.
    """
    trials = sorted(trials_of(results), key=lambda each: each[1] != winner.trial_id)
    each_trial = [
        "".join([_loss_chart(place, label, rungs), _copies_chart(place, label, rungs)])
        for place, (label, _, rungs) in enumerate(trials)
    ]
    if not (charts := [each for each in each_trial if each]):
        return ""
    note = (
        "Training loss is measured on training pictures, validation loss on held-out pictures with the same"
        " noise and timesteps at every rung. If it rises by more than twice its standard error, the model is"
        " over-fitting. Near copies are pictures nearer to a training picture than pictures of a model that"
        " learned nothing by heart come; variety is that of the pictures as a share of real ones'."
    )
    others = (
        "<details><summary>Other learning rates</summary>"
        f'<div class="charts">{"".join(charts[1:])}</div></details>'
    )
    return f'<h2>Over-fitting</h2><p class="note">{escape(note)}</p><div class="charts">{charts[0]}</div>' + (
        others if charts[1:] else ""
    )


def _loss_chart(place: int, label: str, rungs: Rows) -> str:
    if len(points_of(rungs, "validation_loss")) < 2:
        return ""
    curves = []
    for color, (name, key) in enumerate((("training", "train_loss"), ("validation", "validation_loss"))):
        found = [(row.step, finite(row, key)) for row in rungs]
        points = [Point(step, value) for step, value in found if value is not None]
        curves.append(Curve(name, points, color))
    rise = rise_of(rungs)
    text = "Validation loss is lowest at the last rung." if rise is None else str(rise)
    mark = "validation loss rises" if rise and rise.is_clear else "lowest validation loss"
    chart = Chart(
        name=f"loss-{place}",
        title=f"Loss at a learning rate of {label}",
        description=f"{text} {NUMBERS}",
        unit="loss",
        digits=4,
        mark=(rise.step, mark) if rise else None,
    )
    return line_chart(chart, curves)


def _copies_chart(place: int, label: str, rungs: Rows) -> str:
    curves = [
        Curve(name, points_of(rungs, key), color)
        for color, (name, key) in enumerate((("near copies", "near_copies"), ("variety", "spread")))
    ]
    if len(shares := curves[0].points) < 2:
        return ""
    by_chance = max(finite(row, "copies_by_chance") or 0.0 for row in rungs)
    clear = (each.step for each in shares if each.value - SURE * (each.error or 0) > by_chance)
    step = next(clear, None)
    text = "No rung draws more near copies than chance would."
    if step is not None:
        text = f"From {step:,} steps on, there are more near copies than by chance ({by_chance:.0%})."
    chart = Chart(
        name=f"copies-{place}",
        title=f"Near copies and variety at a learning rate of {label}",
        description=f"{text} Learning by heart raises the first and lowers the second. {NUMBERS}",
        unit="share",
        digits=2,
        mark=None if step is None else (step, "more near copies than by chance"),
    )
    return line_chart(chart, curves)
