"""Captions that are longer than a model's text encoders read, and of which the rest is therefore lost."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from cluster.fetched import local_path
from cluster.storage import Storage
from ray_jobs.config import Config
from ray_jobs.data.curation.decisions import Decisions
from ray_jobs.data.curation.scan import Entry, read_index

if TYPE_CHECKING:
    import ray


def long_captions(
    config: Config, entries: Sequence[Entry], index: Storage, decisions: Decisions
) -> "ray.ObjectRef[str | None]":
    """Start to count the kept captions that are cut; return the line that says it, None if there are none."""
    import ray

    files, kept = [entry.file for entry in entries], decisions.reasons == ""
    started: ray.ObjectRef[str | None] = ray.remote(num_cpus=1)(count).remote(config, index, files, kept)
    return started


def count(config: Config, index: Storage, files: Sequence[str], kept: "np.ndarray[Any, Any]") -> str | None:
    """Return the line that says how many of the kept captions are cut, None if there are none.

    Args:
        files: files of the index.
        kept: bool, whether each of their rows is kept.
    """
    from ray_jobs.weights.loading import load_text

    text, tokenizers = load_text(local_path(config.model.base), revision=config.model.revision)
    row = cut = 0
    for table in read_index(index, files, ["text"]):
        captions = [text for text, keep in zip(table["text"].to_pylist(), kept[row:], strict=False) if keep]
        row += len(table)
        cut += sum(text.cut(tokenizers, captions)) if captions else 0
    whole = f"{np.count_nonzero(kept):,} captions"
    return f"{cut:,} of {whole} are longer than {config.model.base} reads, and are cut" if cut else None
