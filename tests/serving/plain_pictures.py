"""A worked example of a safety checker: it blocks pictures that are nearly all of one colour.

serve:
  safety_checker: tests.serving.plain_pictures:make_checker
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from serving.safety import Checker, Verdict

LEAST_SPREAD = 4.0  # mean standard deviation of the channels, of 0 to 255


def make_checker() -> Checker:
    """Called once a replica; a checker that needs a network would load it here."""

    def check(pictures: Sequence[Image.Image]) -> list[Verdict]:
        spreads = [np.asarray(picture.convert("RGB")).std(axis=(0, 1)).mean() for picture in pictures]
        return [Verdict(spread >= LEAST_SPREAD, "it is nearly all of one colour") for spread in spreads]

    return check


def make_covering_checker() -> Checker:
    """The same, but a grey picture is sent instead."""
    check = make_checker()

    def cover(pictures: Sequence[Image.Image]) -> list[Verdict]:
        return [
            verdict
            if verdict.allowed
            else Verdict(False, verdict.reason, Image.new("RGB", picture.size, "grey"))
            for picture, verdict in zip(pictures, check(pictures), strict=True)
        ]

    return cover


def make_broken_checker() -> Checker:
    """Forgets a picture."""
    check = make_checker()
    return lambda pictures: check(pictures)[1:]


def make_untyped_checker() -> object:
    """Answers with what are no verdicts, of which every one is true."""
    return lambda pictures: ["blocked" for _ in pictures]


def make_nothing() -> None:
    """Forgets to return the checker."""


def make_none_without_weights() -> Checker:
    """Its weights are not there."""
    raise FileNotFoundError("no weights at /models/checker")


BLOCKED = (64, 72)  # height and width


def make_shape_checker() -> Checker:
    """Blocks pictures of one size, which a test can ask for."""
    return lambda pictures: [
        Verdict(picture.size[::-1] != BLOCKED, "it has the blocked size") for picture in pictures
    ]
