"""Composition of a dataset: words, repeated captions, sizes, brightness and classes of its kept pictures."""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from ray_jobs.config import Config
from ray_jobs.data.curation.captions import count_captions
from ray_jobs.data.curation.cleaning import COLOUR_FIELDS
from ray_jobs.data.curation.decisions import ROWS_A_PARTITION, Decisions
from ray_jobs.data.curation.rows import Rows, Run, fixed_bytes, labelled
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


@dataclass
class _Composed:
    """Composition of some kept rows; that of all is the sum."""

    words: Counter[str]
    classes: Counter[str]
    spreads: dict[str, dict[str, np.ndarray]]  # measure -> class -> counts
    enlarged: int

    @staticmethod
    def none() -> "_Composed":
        return _Composed(Counter(), Counter(), {name: {} for name in EDGES}, 0)

    def add(self, other: "_Composed") -> None:
        self.words.update(other.words)
        self.classes.update(other.classes)
        self.enlarged += other.enlarged
        for name, of_class in other.spreads.items():
            for value, counts in of_class.items():
                self.spreads[name][value] = self.spreads[name].get(value, 0) + counts


COLUMNS = ["text", "stratum", "width", "height", "colours"]


@dataclass(frozen=True)
class _Compose:
    """Compose a run, of which some rows are kept."""

    rows: Rows
    resolution: int

    def __call__(self, item: tuple[Run, np.ndarray]) -> _Composed:
        run, kept = item
        table, found = self.rows.read(run.low, run.high, COLUMNS).filter(pa.array(kept)), _Composed.none()
        for text in table["text"].to_pylist():
            found.words.update({word for word in WORD.findall(text.casefold()) if word not in COMMON})
        measures = {"side": shorter_sides(table), "brightness": _brightness(table)}
        found.enlarged = int((measures["side"] < self.resolution).sum())
        codes, names = labelled(table["stratum"])
        for code in np.unique(codes).tolist():
            inside = codes == code
            found.classes[names[code]] = int(inside.sum())
            for name, values in measures.items():
                found.spreads[name][names[code]] = _counts(name, values[inside])
        return found


def compose(config: Config, decisions: Decisions) -> Composition:
    """Describe the kept rows, by their captions and measures in the index."""
    rows, kept = decisions.rows, decisions.kept & ~decisions.splits.are("class")
    workers, whole = rows.workers(), _Composed.none()
    items = [(run, kept[run.low : run.high]) for run in rows.runs]
    for found in workers.each(_Compose(rows.for_tasks(), config.data.resolution), items):
        whole.add(found)
    words, classes, spreads = whole.words, whole.classes, whole.spreads
    none = {name: np.zeros(len(edges) - 1, np.int64) for name, edges in EDGES.items()}
    partitions = -(-max(len(rows), 1) // ROWS_A_PARTITION)
    counted = count_captions(rows, kept, workers, partitions, MOST_CAPTIONS)
    column = config.data.column or ""
    even = sum(classes.values()) / max(len(classes), 1)
    scarce = sorted((n, value) for value, n in classes.items() if n < even / 2) if column else []
    return Composition(
        pictures=sum(classes.values()),
        words=dict(words.most_common(MOST_WORDS)),
        repeated=_texts(rows, kept, counted.most),
        num_repeated=counted.repeated,
        enlarged=whole.enlarged,
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


def kept_rows(decisions: Decisions, columns: list[str], within: range) -> Iterator[pa.Table]:
    """Yield the kept rows of each run, without those of class pictures."""
    kept = decisions.kept & ~decisions.splits.are("class")
    for first, table in decisions.rows.tables(columns, within):
        chosen = kept[first : first + len(table)]
        if chosen.any():
            yield table.filter(pa.array(chosen))


def _texts(rows: Rows, kept: np.ndarray, most: dict[int, int]) -> dict[str, int]:
    """Return captions, found by their hashes, with their numbers of rows."""
    found: dict[str, int] = {}
    wanted = np.array(sorted(most), np.uint64)
    for first, table in rows.tables(["text", "text_hash"]) if most else ():
        hashes = table["text_hash"].to_numpy()
        places = np.flatnonzero(np.isin(hashes, wanted) & kept[first : first + len(table)])
        of_texts, some = np.unique(hashes[places], return_index=True)
        texts = table["text"].take(pa.array(places[some])).to_pylist()
        found |= {text: most[int(of)] for of, text in zip(of_texts, texts, strict=True)}
        if len(found) == len(most):
            break
    return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))


def shorter_sides(table: pa.Table) -> np.ndarray:
    """Shorter side of each picture in pixels: int, one per row with `width` and `height`."""
    return np.minimum(table["width"].to_numpy(), table["height"].to_numpy())


def _brightness(table: pa.Table) -> np.ndarray:
    """Mean luma of each picture, from the colours of its fields: float64, 0..255."""
    colours = np.frombuffer(fixed_bytes(table["colours"], 48), np.uint8).reshape(-1, COLOUR_FIELDS**2, 3)
    return np.asarray(colours.mean(axis=1) @ LUMA)


def _counts(name: str, values: np.ndarray) -> np.ndarray:
    edges = EDGES[name]
    return np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0]


def _spread(name: str, counts: np.ndarray) -> Spread:
    return Spread(edges=EDGES[name].tolist(), counts=counts.tolist())
