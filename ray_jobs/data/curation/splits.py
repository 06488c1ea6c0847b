"""Which split and fold a picture belongs to: a function of its bytes, so that it never moves."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")

GOLDEN = (5**0.5 - 1) / 2


def content_digest(data: bytes) -> str:
    """The sha256 of a picture's file, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


@dataclass(frozen=True)
class Shares:
    """How a set is split: the shares of validation and test in [0, 1), the rest is train.

    Another seed gives another, independent assignment.
    """

    seed: int
    validation: float
    test: float

    def split_at(self, position: float) -> Split:
        """[0, 1): below `test` is test, then `validation`, then train."""
        if position < self.test:
            return "test"
        return "validation" if position < self.test + self.validation else "train"


def _position(name: str, seed: int | str) -> float:
    """The place of a digest or another name in [0, 1), uniform, and independent between seeds."""
    keyed = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(keyed[:8], "big") / 2**64


def split_of(digest: str, shares: Shares) -> Split:
    """Assign a picture to a split by hashing its digest with the seed.

    Other pictures have no say, so that adding some moves none.
    """
    return shares.split_at(_position(digest, shares.seed))


def stratified_splits(
    digests: Sequence[str], strata: Sequence[str], shares: Shares, known: dict[str, Split]
) -> list[Split]:
    """Split every stratum in the same shares.

    The k-th picture of a stratum lies at frac(start + k * golden ratio), a sequence that fills [0, 1) so
    evenly that the count in any split is off by at most 1.9 of 100 pictures, and 4.3 of a million: it grows
    with the logarithm (additive recurrence; Kuipers & Niederreiter 1974, chapter 2.3); the start is the
    stratum's hash. A `known` picture keeps its split, and the others continue behind them, so that adding
    pictures moves none.

    Args:
        digests, strata: one a picture, in the order of the source.
        known: digest to split, of pictures that were assigned before.
    """
    taken: dict[str, int] = {}
    for digest, stratum in zip(digests, strata, strict=True):
        taken[stratum] = taken.get(stratum, 0) + (digest in known)
    splits = []
    for digest, stratum in zip(digests, strata, strict=True):
        if digest in known:
            splits.append(known[digest])
            continue
        position = (_position(stratum, shares.seed) + taken[stratum] * GOLDEN) % 1
        taken[stratum] += 1
        splits.append(shares.split_at(position))
    return splits


def fold_of(digest: str, seed: int, folds: int) -> int:
    """Which of `folds` folds a picture of train or validation belongs to; 0 where there are none.

    Near duplicates have to be asked for by the digest of one of them.
    """
    return int(_position(digest, f"{seed}:fold") * folds)


def is_floor_candidate(digest: str, shares: Shares) -> bool:
    """Whether a training picture is among those kept for the floor: three times the share of the test
    split, so that there are twice as many as test pictures also where the shares are uneven by chance.
    """
    training = 1 - shares.validation - shares.test
    return _position(digest, f"{shares.seed}:floor") < 3 * shares.test / training
