"""Splits that weights are scored on, and the names of trainings that leave one out."""

from dataclasses import dataclass
from typing import Literal

SplitName = Literal["train", "validation", "test"]
SPLITS: tuple[SplitName, ...] = ("train", "validation", "test")
REFIT = "refit"


@dataclass(frozen=True)
class Split:
    """Pictures that weights are scored on.

    Attributes:
        name: split of the dataset.
        fold: with cross-validation, the fold that is the validation split; None: the dataset's own.
        run: an earlier run of the storage, whose pictures they are; None: this run.
    """

    name: SplitName
    fold: int | None = None
    run: str | None = None

    @classmethod
    def of_fold(cls, fold: int) -> "Split":
        return cls("validation", fold)

    def __str__(self) -> str:
        name = self.name if self.fold is None else f"fold-{self.fold}"
        return name if self.run is None else f"{name} of {self.run}"


VALIDATION, TEST = Split("validation"), Split("test")


def training_of(trial: str, split: Split) -> str:
    """Return the name of a trial's training that leaves `split` out."""
    return trial if split.fold is None else f"{trial}_{split}"


def refit_of(trial: str) -> str:
    """Return the name of the training of a trial's settings on training and validation splits together."""
    return f"{trial}_{REFIT}"


def unseen_by(training: str) -> Split | None:
    """Return the split that a training leaves out, by its name; None for a refit.

    A refit has seen all pictures but those of the test split.
    """
    last = training.rpartition("_")[2]
    fold = last.removeprefix("fold-")
    if last != fold and fold.isdecimal():
        return Split.of_fold(int(fold))
    return None if last == REFIT else VALIDATION
