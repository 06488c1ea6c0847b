"""What the edits of a run begin with, and what they should become: pictures of its first held-out rows."""

from collections.abc import Sequence
from typing import NamedTuple

from pydantic import BaseModel

from ray_jobs.config import Config
from ray_jobs.data.feeding.dataset import Dataset


class Row(NamedTuple):
    """A held-out row, as PNGs."""

    references: list[bytes]
    target: bytes

    def picture(self, which: str) -> bytes | None:
        """Return `target`, or a reference by its number, counted from 0; None if there is none."""
        if which == "target":
            return self.target
        return self.references[int(which)] if which.isdigit() and int(which) < len(self.references) else None


class Given(BaseModel):
    """How many rows are known, and the number of each one's references."""

    rows: int = 0
    references: int = 0


def held_out_rows(config: Config) -> Sequence[Row]:
    """Return the rows whose edits a rung keeps, in their order.

    There are none without references, before prepare has ended, or with folds, each of which has its own.
    """
    dataset = None if config.search.folds else Dataset.of_run(config)
    if dataset is None or not dataset.manifest.references:
        return []
    rows = dataset.pictures("validation", config.publish.sample_count)
    return [Row(row["references"], row["image"]) for row in rows]
