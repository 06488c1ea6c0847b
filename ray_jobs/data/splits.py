"""Which split a picture belongs to: a pure function of its bytes, so that it never moves."""

import hashlib
from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


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


def _position(digest: str, seed: int) -> float:
    """The picture's place in [0, 1), uniform over pictures and independent between seeds."""
    keyed = hashlib.sha256(f"{seed}:{digest}".encode()).digest()
    return int.from_bytes(keyed[:8], "big") / 2**64


def split_of(digest: str, shares: Shares) -> Split:
    """Assign a picture to a split by hashing its digest with the seed.

    The hash is read as a number in [0, 1): below `test` is test, then `validation`, then train.
    Other pictures have no say, so that adding some moves none.
    """
    position = _position(digest, shares.seed)
    if position < shares.test:
        return "test"
    return "validation" if position < shares.test + shares.validation else "train"


def is_floor_candidate(digest: str, shares: Shares) -> bool:
    """Whether a training picture is among those kept for the floor: three times the share of the test
    split, so that there are twice as many as test pictures also where the shares are uneven by chance.
    """
    start = shares.test + shares.validation
    return start <= _position(digest, shares.seed) < start + 3 * shares.test
