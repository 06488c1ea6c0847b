"""What the fields of a configuration affect: each field says it once, and digests are filters over that."""

from dataclasses import dataclass
from enum import Enum
from typing import Any


class Effect(Enum):
    """What changes with a field: a word, and its meaning in docs/configuration.md."""

    NOTHING = "nothing", "results stay the same, up to rounding: speed, place, limits of a job"
    IMAGES = "images", "the images and captions that are read; in another place the same count as the same"
    ENCODINGS = "encodings", "cached encodings; rows are encoded again"
    DATASET = "data set", "the rows, their splits and their order; only new rows are encoded"
    WEIGHTS = "weights", "what a training computes; one that began with another value is not resumed"
    SCORES = "scores", "what a search finds; it starts over"
    EXTENT = "extent", "how much is done; finished work is kept, and continued where more is asked for"
    PUBLISHING = "publishing", "what publish measures and records after the search"
    SERVING = "serving", "the endpoint"
    PRETRAINING = "pretraining", "the new base model of `python -m ray_jobs.pretrain`"

    def __init__(self, word: str, meaning: str) -> None:
        self.word, self.meaning = word, meaning


@dataclass(frozen=True)
class Formerly:
    """What a field affected in earlier releases.

    Digests keep its default in its place, so that they still recognise results on disk.
    """

    effect: Effect


@dataclass(frozen=True)
class Added:
    """What earlier releases did, which did not have a field.

    Digests leave the field out where it has this value, so that they still recognise results on disk.
    """

    before: Any = None
