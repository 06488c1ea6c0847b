"""Signs in the numbers of a training that something is wrong, as lines that name the number and a fix."""

from collections.abc import Sequence
from typing import Protocol

from ray_jobs.console.troubleshooting import Help, help_link
from ray_jobs.run.records import RungRow

STILL = 1e-3
"""Change of the held-out rows' losses, as a share of them, below which a training has not moved.

With the demo's base it was 0.4 at a rate of 1e-3 and 0.5 at 1e-4, from step 20 to 80, but 0.001 at 1e-6, from
step 10 to 40. Larger models, which know more of their pictures beforehand, move less at rates of use.
"""


class Measured(Protocol):
    """A rung with the loss of each held-out row, on the same noise at every rung."""

    @property
    def step(self) -> int: ...

    @property
    def validation_losses(self) -> list[float]: ...


def change(rungs: Sequence[Measured]) -> float | None:
    """Return the mean change of the rows' losses from the first rung to the last, as a share of the first.

    Rises and falls of single rows do not cancel, so that over-fitting and a plateau count as a change. None
    for fewer than two rungs.
    """
    if len(rungs) < 2:
        return None
    first, last = rungs[0].validation_losses, rungs[-1].validation_losses
    if not first or len(first) != len(last) or not sum(first) > 0:
        return None
    return sum(abs(a - b) for a, b in zip(first, last, strict=True)) / sum(first)


def no_change_line(name: str, rungs: Sequence[Measured]) -> str | None:
    """Return the line about a training whose loss does not move; None if it does or is not known.

    Args:
        rungs: its rungs, in ascending order of step.
    """
    moved = change(rungs)
    if moved is None or moved >= STILL:
        return None
    return (
        f"{name}: from step {rungs[0].step} to {rungs[-1].step} its losses on held-out pictures changed by "
        f"{moved:.2g} of their size: the learning rate is too low, or the steps are too few; "
        f"{help_link(Help.NO_CHANGE)}"
    )


def black_line(name: str, black: int, num_samples: int, precision: str) -> str | None:
    """Return the line about black pictures; None without any.

    Args:
        precision: `evaluate.precision`, in which they were drawn.
    """
    if not black:
        return None
    fix = "look at the loss and at the base's pictures"
    if precision == "fp16":  # the others have float32's range
        fix = "set evaluate.precision: bf16 or fp32"
    return f"{name}: {black} of {num_samples} pictures are black: {fix}; {help_link(Help.BLACK_PICTURES)}"


def signs_of(rows: Sequence[RungRow], precision: str, *, ended: bool = True) -> list[str]:
    """Return the lines about a search: trainings whose loss does not move, or that draw black pictures.

    Args:
        rows: one per measured rung.
        precision: `evaluate.precision`.
        ended: whether the trainings have ended; before, a loss may still begin to move.
    """
    trainings: dict[str, list[RungRow]] = {}
    for row in sorted(rows, key=lambda row: row.step):
        trainings.setdefault(row.training_name, []).append(row)
    found = []
    for name, rungs in trainings.items():
        worst, black = max(rungs, key=lambda row: row.black), sum(row.black > 0 for row in rungs)
        others = f", as at {black - 1} more of its rungs" if black > 1 else ""
        place = f"{name} at {worst.step}{others}"
        lines = [black_line(place, worst.black, worst.num_samples or 0, precision)]
        lines += [no_change_line(name, rungs)] if ended else []
        found += [line for line in lines if line]
    return found
