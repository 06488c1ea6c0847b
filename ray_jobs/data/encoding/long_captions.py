"""Captions that are longer than a model's text encoders read, and of which the rest is therefore lost."""

from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from cluster.fetched import local_path
from ray_jobs.config import Config
from ray_jobs.data.curation.decisions import Decisions
from ray_jobs.data.curation.rows import Rows

if TYPE_CHECKING:
    import ray


def long_captions(config: Config, decisions: Decisions) -> "ray.ObjectRef[str | None]":
    """Start to count the kept captions that are cut; return the line that says it, None if there are none."""
    import ray

    rows = decisions.rows.for_tasks()
    started: ray.ObjectRef[str | None] = ray.remote(num_cpus=1)(count).remote(config, rows, decisions.kept)
    return started


def count(config: Config, rows: Rows, kept: "np.ndarray[Any, Any]") -> str | None:
    """Return the line that says how many of the kept captions are cut, None if there are none.

    Args:
        kept: bool, whether each row is kept.
    """
    from ray_jobs.weights.loading import load_text

    text, tokenizers = load_text(local_path(config.model.base), revision=config.model.revision)
    cut = 0
    for first, table in rows.tables(["text"]):
        captions = table["text"].filter(pa.array(kept[first : first + len(table)])).to_pylist()
        cut += sum(text.cut(tokenizers, captions)) if captions else 0
    whole = f"{np.count_nonzero(kept):,} captions"
    return f"{cut:,} of {whole} are longer than {config.model.base} reads, and are cut" if cut else None
