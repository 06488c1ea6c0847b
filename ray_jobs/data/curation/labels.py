"""Labels of many rows, one byte each: why a row is rejected, or which split it is in."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Labels:
    """One label per row.

    Attributes:
        codes: uint8, number of each row's label.
        names: labels by their numbers.
    """

    codes: np.ndarray
    names: list[str]

    def __len__(self) -> int:
        return len(self.codes)

    def at(self, rows: "slice | np.ndarray") -> "Labels":
        """Return the labels of some rows."""
        return Labels(self.codes[rows], self.names)

    def of_row(self, row: int) -> str:
        return self.names[int(self.codes[row])]

    def tolist(self) -> list[str]:
        """Return the label of each row."""
        return [self.names[code] for code in self.codes.tolist()]

    def are(self, *names: str) -> np.ndarray:
        """Return whether each row has one of some labels: bool."""
        wanted = np.array([name in names for name in [*self.names, ""][: len(self.names)]], bool)
        return wanted[self.codes] if len(wanted) else np.zeros(len(self.codes), bool)

    def code(self, name: str) -> int:
        """Return the number of a label, which is added if no row has it yet."""
        if name not in self.names:
            if len(self.names) > np.iinfo(np.uint8).max:
                raise ValueError(f"{name}: more than 256 labels")
            self.names.append(name)
        return self.names.index(name)

    def counts(self) -> Counter[str]:
        """Return the number of rows of each label that occurs."""
        counted = np.bincount(self.codes, minlength=len(self.names)).tolist()
        return Counter({name: count for name, count in zip(self.names, counted, strict=True) if count})

    def copy(self) -> "Labels":
        return Labels(self.codes.copy(), list(self.names))


def joined(labels: Iterable[Labels], first: str) -> Labels:
    """Return the labels of consecutive runs of rows as one; `first` has number 0."""
    whole, codes = Labels(np.empty(0, np.uint8), [first]), [np.empty(0, np.uint8)]
    for each in labels:
        numbers = np.array([whole.code(name) for name in each.names], np.uint8)
        codes.append(numbers[each.codes] if len(numbers) else each.codes)
    return Labels(np.concatenate(codes), whole.names)
