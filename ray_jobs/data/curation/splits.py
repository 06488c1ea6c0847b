"""Assignment of a picture to a split and fold: a function of its bytes, so that it never moves."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from ray_jobs.run.split import SplitName

GOLDEN = (5**0.5 - 1) / 2


def content_digest(data: bytes) -> str:
    """SHA-256 of a picture's file, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


@dataclass(frozen=True)
class Shares:
    """Shares of validation and test in [0, 1); the rest is train.

    Different seeds give independent assignments.
    """

    seed: int
    validation: float
    test: float

    def split_at(self, position: float) -> SplitName:
        """Return the split at a position in [0, 1): test first, then validation, then train."""
        if position < self.test:
            return "test"
        return "validation" if position < self.test + self.validation else "train"


def _position(name: str, seed: int | str) -> float:
    """Position of a digest or other name in [0, 1), uniform, and independent between seeds."""
    keyed = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(keyed[:8], "big") / 2**64


def split_of(digest: str, shares: Shares) -> SplitName:
    """Assign a picture to a split by hashing its digest with the seed.

    The result does not depend on other pictures, so adding some moves none.
    """
    return shares.split_at(_position(digest, shares.seed))


def stratified_splits(
    digests: Sequence[str], strata: Sequence[str], shares: Shares, known: dict[str, SplitName]
) -> list[SplitName]:
    """Split every stratum in the same shares.

    The k-th picture of a stratum has the position frac(start + k * golden ratio), where start is the
    stratum's hash. This sequence fills [0, 1) so evenly that the count in any split is off by at most 1.9 of
    100 pictures and 4.3 of a million: the deviation grows logarithmically (additive recurrence; Kuipers &
    Niederreiter 1974, chapter 2.3). A `known` picture keeps its split, and the others continue after them, so
    that adding pictures moves none.

    Args:
        digests, strata: one per picture, in source order.
        known: split by digest, for pictures assigned before.
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
    """Return the fold (of `folds`) of a picture of train or validation; 0 if there are no folds.

    For near duplicates, pass the digest of one of them for all.
    """
    return int(_position(digest, f"{seed}:fold") * folds)


def even_folds(names: Sequence[str], strata: Sequence[object], seed: int, folds: int) -> list[int]:
    """Folds of few pictures, as even as whole groups allow, each stratum too.

    Unlike `fold_of` the result depends on the other pictures.

    Args:
        names: group of each picture, of near duplicates, which stay together.
        strata: of each picture; a group has that of its first one.
    """
    sizes, kinds = Counter(names), dict(zip(reversed(names), reversed(strata), strict=True))
    of_group: dict[str, int] = {}
    filled = [Counter[object]() for _ in range(folds)]
    for name in sorted(sizes, key=lambda name: (-sizes[name], _position(name, f"{seed}:fold"))):
        kind = kinds[name]
        fold = min(range(folds), key=lambda fold: (filled[fold][kind], filled[fold].total(), fold))
        of_group[name] = fold
        filled[fold][kind] += sizes[name]
    return [of_group[name] for name in names]


def is_floor_candidate(digest: str, shares: Shares) -> bool:
    """Return whether a training picture is kept for the floor.

    The share is three times that of the test split, so that there are twice as many as test pictures even if
    the shares are uneven by chance.
    """
    training = 1 - shares.validation - shares.test
    return _position(digest, f"{shares.seed}:floor") < 3 * shares.test / training
