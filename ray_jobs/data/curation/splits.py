"""Assignment of a picture to a split and fold: a function of its bytes, so that it never moves."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ray_jobs.run.split import SPLITS, SplitName

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

    def splits_at(self, positions: np.ndarray) -> np.ndarray:
        """Return the numbers, in SPLITS, of the splits at many positions: uint8."""
        found = np.full(len(positions), SPLITS.index("train"), np.uint8)
        found[positions < self.test + self.validation] = SPLITS.index("validation")
        found[positions < self.test] = SPLITS.index("test")
        return found


def _position(name: str, seed: int | str) -> float:
    """Position of a digest or other name in [0, 1), uniform, and independent between seeds."""
    keyed = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(keyed[:8], "big") / 2**64


def _positions(names: Sequence[bytes], seed: int | str) -> np.ndarray:
    """Return `_position` of many names: float64."""
    sha256, start = hashlib.sha256, f"{seed}:".encode()
    keyed = b"".join([sha256(start + name).digest()[:8] for name in names])
    return np.frombuffer(keyed, ">u8").astype(np.float64) / 2**64


def split_of(digest: str, shares: Shares) -> SplitName:
    """Assign a picture to a split by hashing its digest with the seed.

    The result does not depend on other pictures, so adding some moves none.
    """
    return shares.split_at(_position(digest, shares.seed))


def splits_of(digests: Sequence[bytes], shares: Shares) -> np.ndarray:
    """Return the numbers, in SPLITS, of the splits of many pictures, as `split_of`: uint8."""
    return shares.splits_at(_positions(digests, shares.seed))


def stratified_splits(
    strata: np.ndarray, names: Sequence[str], shares: Shares, known: np.ndarray
) -> np.ndarray:
    """Split every stratum in the same shares.

    The k-th picture of a stratum has the position frac(start + k * golden ratio), where start is the
    stratum's hash. This sequence fills [0, 1) so evenly that the count in any split is off by at most 1.9 of
    100 pictures and 4.3 of a million: the deviation grows logarithmically (additive recurrence; Kuipers &
    Niederreiter 1974, chapter 2.3). A `known` picture keeps its split, and the others continue after them, so
    that adding pictures moves none.

    Args:
        strata: int, number in `names` of each picture's stratum, in source order.
        names: the strata.
        known: int, number in SPLITS of the split of a picture assigned before; else negative.

    Returns:
        uint8, number in SPLITS of each picture's split.
    """
    new = np.flatnonzero(known < 0)
    before = np.bincount(strata[known >= 0], minlength=len(names))
    order = new[np.argsort(strata[new], kind="stable")]
    counts = np.bincount(strata[new], minlength=len(names))
    inside = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = np.array([_position(name, shares.seed) for name in names])
    positions = (starts[strata[order]] + (before[strata[order]] + inside) * GOLDEN) % 1
    splits = known.astype(np.uint8)
    splits[order] = shares.splits_at(positions)
    return splits


def folds_of(digests: Sequence[bytes], seed: int, folds: int) -> np.ndarray:
    """Return the folds (of `folds`) of pictures of train or validation: int16.

    For near duplicates, pass the digest of one of them for all.
    """
    return (_positions(digests, f"{seed}:fold") * folds).astype(np.int16)


def even_folds(names: Sequence[str], strata: Sequence[object], seed: int, folds: int) -> list[int]:
    """Folds of few pictures, as even as whole groups allow, each stratum too.

    Unlike `folds_of` the result depends on the other pictures.

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


def are_floor_candidates(digests: Sequence[bytes], shares: Shares) -> np.ndarray:
    """Return which training pictures are kept for the floor: bool.

    The share is three times that of the test split, so that there are twice as many as test pictures even if
    the shares are uneven by chance.
    """
    if not digests:
        return np.zeros(0, bool)
    training = 1 - shares.validation - shares.test
    return np.asarray(_positions(digests, f"{shares.seed}:floor") < 3 * shares.test / training)
