"""Composition of a dataset: words, repeated captions, sizes, brightness and classes of its kept pictures."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa

from cluster.storage import Storage
from ray_jobs.config import Config
from ray_jobs.data.curation.decisions import Decisions
from ray_jobs.data.curation.scan import Entry, read_index
from ray_jobs.run.manifest import Class, Composition, Spread

MOST_WORDS, MOST_CAPTIONS, MOST_CLASSES = 40, 10, 12
WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")
# Words that say nothing about what is in a picture.
COMMON = {
    *("a", "an", "and", "are", "as", "at", "by", "for", "from", "has", "her", "his", "in", "into", "is"),
    *("it", "its", "of", "on", "or", "over", "that", "the", "their", "there", "these", "this", "to", "with"),
}
EDGES = {
    "side": np.round(2.0 ** np.arange(4, 13.5, 0.5)),  # shorter side in pixels
    "brightness": np.linspace(0, 256, 17),  # mean luma
}
LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601


def compose(config: Config, entries: Sequence[Entry], index: Storage, decisions: Decisions) -> Composition:
    """Describe the kept rows, by their captions and measures in the index."""
    words, hashes, classes = Counter[str](), list[np.ndarray](), Counter[str]()
    none = {name: np.zeros(len(edges) - 1, np.int64) for name, edges in EDGES.items()}
    spreads = {name: defaultdict[str, np.ndarray](none[name].copy) for name in EDGES}
    enlarged = 0
    for table in kept_rows(entries, index, decisions, ["text", "stratum", "width", "height", "colours"]):
        texts = table["text"].to_pylist()
        for text in texts:
            words.update({word for word in WORD.findall(text.casefold()) if word not in COMMON})
        hashes.append(np.array([hash(text) for text in texts], np.int64))
        measures = {"side": shorter_sides(table), "brightness": _brightness(table)}
        enlarged += int((measures["side"] < config.data.resolution).sum())
        strata = np.array(table["stratum"].to_pylist(), object)
        classes.update(strata.tolist())
        for value in np.unique(strata):
            for name, values in measures.items():
                spreads[name][value] += _counts(name, values[strata == value])
    repeated, num_repeated = _repeated(entries, index, decisions, hashes)
    column = config.data.column or ""
    even = sum(classes.values()) / max(len(classes), 1)
    scarce = sorted((n, value) for value, n in classes.items() if n < even / 2) if column else []
    return Composition(
        pictures=sum(classes.values()),
        words=dict(words.most_common(MOST_WORDS)),
        repeated=repeated,
        num_repeated=num_repeated,
        enlarged=enlarged,
        spreads={
            name: _spread(name, sum(of_class.values(), none[name])) for name, of_class in spreads.items()
        },
        column=column,
        num_classes=len(classes) if column else 0,
        classes={
            value: Class(
                pictures=count,
                spreads={name: _spread(name, of_class[value]) for name, of_class in spreads.items()},
            )
            for value, count in (classes.most_common(MOST_CLASSES) if column else ())
        },
        scarce={value: count for count, value in scarce[:MOST_CLASSES]},
        num_scarce=len(scarce),
    )


def kept_rows(
    entries: Sequence[Entry],
    index: Storage,
    decisions: Decisions,
    columns: list[str],
    source: int | None = None,
) -> Iterator[pa.Table]:
    """Yield the kept rows of index files, without those of class pictures.

    Args:
        source: number of the source whose files are read; None: all.
    """
    wanted = [n for n, entry in enumerate(entries) if source in (None, entry.source)]
    ends = np.cumsum(decisions.counts)
    tables = read_index(index, [entries[n].file for n in wanted], [*columns, "role"])
    for number, table in zip(wanted, tables, strict=True):
        kept = decisions.reasons[ends[number] - len(table) : ends[number]] == ""
        kept &= np.array(table["role"].to_pylist(), object) == "instance"
        if kept.any():
            yield table.filter(pa.array(kept))


def _repeated(
    entries: Sequence[Entry], index: Storage, decisions: Decisions, hashes: Sequence[np.ndarray]
) -> tuple[dict[str, int], int]:
    """Captions of most rows, with their numbers; and the number of rows whose caption is not the only one."""
    if not hashes:
        return {}, 0
    different, counts = np.unique(np.concatenate(hashes), return_counts=True)
    order = np.argsort(-counts, kind="stable")[:MOST_CAPTIONS]
    most = {int(different[n]): int(counts[n]) for n in order if counts[n] > 1}
    found: dict[str, int] = {}
    # Read again, since all captions of a large set are too many to keep.
    for table in kept_rows(entries, index, decisions, ["text"]) if most else ():
        found |= {text: most[hash(text)] for text in table["text"].to_pylist() if hash(text) in most}
        if len(found) == len(most):
            break
    return dict(sorted(found.items(), key=lambda item: (-item[1], item[0]))), int(counts[counts > 1].sum())


def shorter_sides(table: pa.Table) -> np.ndarray:
    """Shorter side of each picture in pixels: int, one per row with `width` and `height`."""
    return np.minimum(table["width"].to_numpy(), table["height"].to_numpy())


def _brightness(table: pa.Table) -> np.ndarray:
    """Mean luma of each picture, from the colours of its fields: float64, 0..255."""
    colours = np.frombuffer(b"".join(table["colours"].to_pylist()), np.uint8).reshape(len(table), -1, 3)
    return np.asarray(colours.mean(axis=1) @ LUMA)


def _counts(name: str, values: np.ndarray) -> np.ndarray:
    edges = EDGES[name]
    return np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0]


def _spread(name: str, counts: np.ndarray) -> Spread:
    return Spread(edges=EDGES[name].tolist(), counts=counts.tolist())
