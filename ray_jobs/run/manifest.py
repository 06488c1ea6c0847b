"""Manifest of a prepared dataset (dataset/manifest.json)."""

import json
from typing import Literal, Self

from pydantic import Field

from cluster.storage import Storage
from ray_jobs.run.records import Record

MANIFEST = "manifest.json"


class Duplicates(Record):
    """Duplicate pictures.

    Attributes:
        mode: `data.cleaning.duplicates`.
        groups: groups of similar pictures.
        pictures: rejected duplicates.
    """

    mode: str = "ignore"
    groups: int = 0
    pictures: int = 0


class SourceShare(Record):
    """Kept rows of a source, and its share of a training epoch."""

    name: str
    rows: int
    share: float


class Bucket(Record):
    """Training rows of a shape, its whole batches in an epoch, and the rows that they leave over."""

    rows: int
    steps: int
    rows_over: int


class Captions(Record):
    """Number of different captions, of repaired ones, of ones with several lines, and written by a model."""

    different: int = 0
    repaired: int = 0
    of_lines: int = 0
    written: int = 0


class Histogram(Record):
    """Values of one quality measure over all pictures.

    Attributes:
        edges: n + 1 increasing edges of the bins of `counts`.
        threshold: pictures on its `side` are rejected; None: none are.
        field: setting of the threshold.
        set_aside: number of pictures rejected by it.
    """

    edges: list[float]
    counts: list[int]
    threshold: float | None
    side: Literal["below", "above"]
    field: str
    set_aside: int


class Spread(Record):
    """Values of a property over the kept pictures: n + 1 increasing edges of the bins of `counts`."""

    edges: list[float]
    counts: list[int]


class Class(Record):
    """Kept pictures with one value of a column, and their properties by name."""

    pictures: int
    spreads: dict[str, Spread] = {}


class Composition(Record):
    """What the kept pictures and captions are.

    Attributes:
        pictures: number of rows.
        words: most frequent words, with the number of captions that have them.
        repeated: captions of most rows, with the number of these.
        num_repeated: rows whose caption another row has too.
        enlarged: rows whose picture has a shorter side below `data.resolution`.
        spreads: shorter side and brightness, by name.
        column: `data.stratify` or `data.balance`; "" without.
        num_classes: number of its values.
        classes: pictures of its most frequent values.
        scarce: values with less than half of an equal share, the rarest first, with their pictures.
        num_scarce: number of these values.
    """

    pictures: int = 0
    words: dict[str, int] = {}
    repeated: dict[str, int] = {}
    num_repeated: int = 0
    enlarged: int = 0
    spreads: dict[str, Spread] = {}
    column: str = ""
    num_classes: int = 0
    classes: dict[str, Class] = {}
    scarce: dict[str, int] = {}
    num_scarce: int = 0


class Manifest(Record):
    """What prepare decided about a dataset.

    Attributes:
        train, validation, test, class_: kept pictures of each split, without augmented variants.
        encode: `data.encode`: "cache" or "stream".
        held_out: whether validation and test pictures are held out; too few pictures are not split.
        rejected, left_out: pictures by reason; those left out do not count as rows.
        no_pictures: other files by suffix.
        buckets: by shape, named width x height.
        folds: pictures of each cross-validation fold.
        measures: histograms by quality measure.
        rows_an_epoch: training rows of an epoch, with augmented variants and repeated as sources' weights
            ask; 0: not recorded by an earlier release.
        composition: words, sizes, brightness and classes of the kept pictures; empty in earlier releases.
        judged: number of pictures among which `rejected` are; 0: not recorded by an earlier release.
        references: number of each row's reference pictures; 1 if the model paints into its mask.
        control: whether each row has a control image.
        digest: digest of the pictures, captions and splits.
        inputs: digest of sources and settings, by which prepare knows its own result again.
        content: digest of the training input.
        encoders: digest of the encoders.
    """

    train: int = 0
    validation: int = 0
    test: int = 0
    class_: int = Field(0, alias="class")
    encode: str = "cache"
    held_out: bool = True
    rejected: dict[str, int] = {}
    left_out: dict[str, int] = {}
    no_pictures: dict[str, int] = {}
    duplicates: Duplicates = Duplicates()
    source: list[SourceShare] = []
    buckets: dict[str, Bucket] = {}
    folds: list[int] = []
    captions: Captions = Captions()
    measures: dict[str, Histogram] = {}
    rows_an_epoch: int = 0
    composition: Composition = Composition()
    judged: int = 0
    references: int = 0
    control: bool = False
    digest: str = ""
    inputs: str = ""
    content: str = ""
    encoders: str = ""

    @classmethod
    def read(cls, dataset: Storage) -> Self:
        """Read manifest.json from the dataset's folder.

        Raises:
            ConfigError: it has a newer format, or is damaged.
        """
        return cls.parse(dataset.read_json(MANIFEST), f"{dataset.uri}/{MANIFEST}")

    def write(self, dataset: Storage) -> None:
        dataset.write_text(MANIFEST, json.dumps(self.fields(), indent=2) + "\n")

    def rows(self, split: str) -> int:
        """Return the number of pictures of a split: train, validation, test or class."""
        return {"train": self.train, "validation": self.validation, "test": self.test, "class": self.class_}[
            split
        ]
