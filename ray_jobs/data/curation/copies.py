"""Exact copies: rows of equal pictures meet in a partition by their digest, whatever run they are in."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

KNOWN = -1  # the row number of a picture that an earlier run kept; it sorts before all rows


class Block(NamedTuple):
    """Rows of one run, or pictures known from earlier, that belong to a partition.

    The first half of a digest stands for it: two of a billion pictures share it with a probability of 1e-21.
    """

    rows: np.ndarray  # int64, N: their numbers in the dataset, or KNOWN
    words: np.ndarray  # uint64, N x 2: the first half of their digests
    values: np.ndarray  # uint64, N: hashes of their captions; of known pictures, the number of their split


@dataclass(frozen=True)
class Copies:
    """What a partition finds.

    Attributes:
        later: rows of pictures that an earlier row has too, and the picture's first row: int64, N x 2.
        repeated: rows with the picture and the caption of an earlier row, and the first such row: int64,
            M x 2.
        known: first rows of pictures known from earlier, and the numbers of their splits: int64, K x 2.
    """

    later: np.ndarray
    repeated: np.ndarray
    known: np.ndarray


def deal(block: Block, num_partitions: int) -> list[Block]:
    """Divide rows by their digests: equal ones of all runs come to the same partition."""
    if num_partitions == 1:
        return [block]
    receivers = (block.words[:, 1] % np.uint64(num_partitions)).astype(np.int64)
    order = np.argsort(receivers, kind="stable")
    ends = np.cumsum(np.bincount(receivers, minlength=num_partitions))
    return [Block(*(column[some] for column in block)) for some in np.split(order, ends[:-1])]


def find_copies(blocks: Sequence[Block]) -> Copies:
    """Find the copies in a partition; the order of the blocks does not matter."""
    none = Block(np.empty(0, np.int64), np.empty((0, 2), np.uint64), np.empty(0, np.uint64))
    rows, words, values = (np.concatenate(columns) for columns in zip(none, *blocks, strict=True))
    order = np.lexsort((rows, words[:, 1], words[:, 0]))
    rows, words, values = rows[order], words[order], values[order]
    begins = _changes(words[:, 0]) | _changes(words[:, 1])
    is_known = rows == KNOWN
    group = np.cumsum(begins) - 1
    # Known pictures come first in their groups; the group's first row follows.
    known_of = np.full(len(rows) and int(group[-1]) + 1, -1)
    known_of[group[is_known]] = values[is_known].astype(np.int64)
    rows, words, values, group = rows[~is_known], words[~is_known], values[~is_known], group[~is_known]
    first = _changes(group)
    firsts = rows[np.maximum.accumulate(np.where(first, np.arange(len(rows)), 0))]
    later = np.column_stack([rows[~first], firsts[~first]])
    split = known_of[group[first]]
    known = np.column_stack([rows[first], split])[split >= 0]
    # Only pictures with several rows can have a caption twice.
    several = ~first
    several[:-1] |= ~first[1:]
    some, captions, of = rows[several], values[several], group[several]
    order = np.lexsort((some, captions, of))
    some, begins = some[order], _changes(captions[order]) | _changes(of[order])
    least = some[np.maximum.accumulate(np.where(begins, np.arange(len(some)), 0))]
    return Copies(later, np.column_stack([some[~begins], least[~begins]]), known)


def _changes(values: np.ndarray) -> np.ndarray:
    """Return whether each value differs from the one before it: bool; True for the first."""
    return np.concatenate([np.ones(min(1, len(values)), bool), values[1:] != values[:-1]])
