"""Search for near duplicates in a whole dataset.

Two pictures are near duplicates if their 64-bit perceptual hashes differ in at most `distance` bits and
the mean absolute difference of their colours (mean RGB of 4 x 4 fields, 48 bytes) is at most `colour` of
the full range.

The search follows Manku, Jain & Das Sarma, "Detecting near-duplicates for web crawling" (WWW 2007): cut the
64 bits into distance + k blocks. Hashes that differ in `distance` bits differ in at most that many blocks, so
they agree in at least k. For each choice of k blocks there is a table, keyed by their bits, in which only
rows with equal keys are compared. A pair belongs to the table of the first k blocks in which it agrees, and
is found only there.

Cost for N rows: N x tables keys are created, sorted and moved between machines (66 bytes each). Well-spread
hashes need tables x N^2 / 2^(key bits + 1) comparisons. A larger k gives more tables with longer keys, so k
is chosen for the least cost given N and the distance: at distance 4 and a million rows k = 2, with 15 tables
of 21 bits; at distance 0 always one table of all 64. Among rows with equal keys, only those whose mean
colours are within the tolerance are compared (a difference of means is at most the mean difference). Copies,
equal in every bit of hash and colours, are represented by one row. A task's memory therefore grows with its
rows and the pairs that it finds, never with the square of the rows per key. Its time does grow so if many
hashes are equal although the pictures are not copies: one to four minutes for 100,000. Similar pictures that
are not copies all form pairs: m of them form m^2 / 2, of which a task accepts at most `MAX_PAIRS`.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ray_jobs.config import ConfigError

HASH_BITS = 64
COLOUR_RANGE = 48 * 255  # range of a picture's colour sum, and of the summed difference of two
# Low bits of a sorting key, for a colour sum plus a tolerance.
SUM_BITS = 15
# Cost of a comparison with one row of the same key, relative to creating and sorting a key. Measured: 0.004
# for evenly spread mean colours, 0.03 for equal ones; hashes of real pictures are less spread.
COMPARISON_COST = 0.02
CANDIDATES_AT_ONCE = 1 << 19  # pairs compared in one step; two copies of their colours are 50 MB
MAX_PAIRS = 1 << 25  # maximum per task: 1.7 GiB during sorting
KEYS_A_TASK = 1 << 22  # 264 MiB of rows


class Pictures(NamedTuple):
    """Search data of N pictures: IDs, hashes, colours."""

    ids: np.ndarray  # int64, N: unique; in dataset order
    hashes: np.ndarray  # uint64, N
    colours: np.ndarray  # uint8, N x 48

    def at(self, rows: np.ndarray) -> "Pictures":
        return Pictures(*(column[rows] for column in self))


@dataclass(frozen=True)
class Pairs:
    """Near duplicates of a whole dataset as sorted pairs of picture IDs, the smaller first.

    Copies have the same hash and colours, and thus the same near duplicates. Each copy is listed once, with
    the first of its group; `near` holds the pairs among pictures that are not copies.
    """

    near: np.ndarray  # int64, M x 2
    copies: np.ndarray  # int64, K x 2: the first, its copy


@dataclass(frozen=True)
class Table:
    """A choice of blocks of the hash.

    `key` is the mask of their bits; `before` has the masks of the other blocks before the last chosen one.
    """

    key: np.uint64
    before: tuple[np.uint64, ...]


def make_tables(distance: int, agreeing: int) -> list[Table]:
    """Make one table per choice of `agreeing` of the distance + agreeing blocks of the 64 bits.

    Hashes within `distance` have equal keys in at least one table; in exactly one of those they also differ
    in each block of `before`.
    """
    num_blocks = distance + agreeing
    edges = [HASH_BITS * block // num_blocks for block in range(num_blocks + 1)]
    masks = [(1 << high) - (1 << low) for low, high in itertools.pairwise(edges)]
    return [
        Table(
            np.uint64(sum(masks[block] for block in chosen)),
            tuple(np.uint64(masks[block]) for block in range(chosen[-1]) if block not in chosen),
        )
        for chosen in itertools.combinations(range(num_blocks), agreeing)
    ]


def least_cost(distance: int, num_rows: int) -> int:
    """Number of agreeing blocks (the paper's k) that minimises the cost of keys and comparisons."""

    def cost(agreeing: int) -> float:
        num_blocks = distance + agreeing
        rows_a_key = num_rows / 2 ** (HASH_BITS * agreeing / num_blocks)
        return math.comb(num_blocks, agreeing) * (1 + COMPARISON_COST * rows_a_key)

    return min(range(1, 5), key=cost)


def near_pairs(
    hashes: np.ndarray, colours: np.ndarray, *, distance: int, colour: float, agreeing: int | None = None
) -> Pairs:
    """Find the near duplicates of a dataset in this process; IDs are positions.

    Args:
        hashes: uint64, N.
        colours: uint8, N x 48.
        distance: bits, 0 to 8.
        colour: share of the full range, 0 to 1.
        agreeing: the paper's k; None: the one of least cost.

    Raises:
        ConfigError: there are more than `MAX_PAIRS`.
    """
    tables = make_tables(distance, agreeing or least_cost(distance, len(hashes)))
    firsts, copies = _collapse(Pictures(np.arange(len(hashes)), hashes, colours))
    found = (pairs for table in tables for pairs in _compare(firsts, table, distance, colour))
    return _sorted_pairs(_limited(found), [copies])


def find_near_pairs(
    parts: Sequence[Callable[[], Pictures]], *, distance: int, colour: float, keys_a_task: int = KEYS_A_TASK
) -> Pairs:
    """Find the near duplicates of a dataset by Ray tasks: as `near_pairs`, with the IDs of the parts.

    One task reads each part and another distributes its rows, once per table, to search tasks of
    `keys_a_task` keys each, which compare rows with equal keys. A small dataset is compared by one task. Only
    the pairs are returned to this process.

    Args:
        parts: at least one function; each is called inside a task and returns its pictures.
        distance: bits, 0 to 8.
        colour: share of the full range, 0 to 1.
        keys_a_task: keys per task, of 66 bytes each; a task needs 1.3 times that in addition, or six times if
            all are copies.

    Raises:
        ConfigError: a task found more than `MAX_PAIRS`.
    """
    import ray

    read = ray.remote(num_returns=2)(_read)
    counts, blocks = zip(*(read.remote(part) for part in parts), strict=True)
    num_rows = sum(ray.get(list(counts)))
    tables = make_tables(distance, least_cost(distance, num_rows))
    num_tasks = math.ceil(num_rows * len(tables) / keys_a_task)
    if num_tasks <= 1:
        found = [ray.remote(search_all).remote(distance, colour, *blocks)]
    else:
        deal = ray.remote(num_returns=num_tasks)(_deal)
        dealt = [deal.remote(block, tables, num_tasks) for block in blocks]
        search = ray.remote(_search)
        found = [search.remote(tables, distance, colour, *blocks) for blocks in zip(*dealt, strict=True)]
    results = ray.get(found)
    return _sorted_pairs([pairs.near for pairs in results], [pairs.copies for pairs in results])


def _read(part: Callable[[], Pictures]) -> tuple[int, Pictures]:
    pictures = Pictures(*part())
    num_rows = len(pictures.ids)
    assert pictures.hashes.shape == (num_rows,) and pictures.hashes.dtype == np.uint64
    assert pictures.colours.shape == (num_rows, 48) and pictures.colours.dtype == np.uint8
    return num_rows, pictures


def search_all(distance: int, colour: float, *blocks: Pictures) -> Pairs:
    """Find the near duplicates of a dataset in this process: as `near_pairs`, with the IDs of the blocks."""
    ids, hashes, colours = _sorted_by_id(_joined(blocks))
    found = near_pairs(hashes, colours, distance=distance, colour=colour)
    return Pairs(ids[found.near], ids[found.copies])


def _deal(pictures: Pictures, tables: list[Table], num_tasks: int) -> Iterator[tuple[np.ndarray, Pictures]]:
    """Yield, for each task, the rows that it compares, with their table numbers (uint16).

    A key goes to the same task from every part. A key shared by many hashes, such as 0, goes to a different
    task in each table.
    """
    hashes = pictures.hashes
    receivers = [(_mix(hashes & table.key) >> 32) + number for number, table in enumerate(tables)]
    dealt = (np.stack(receivers) % num_tasks).astype(np.uint32)
    order = np.argsort(dealt, axis=None, kind="stable")
    ends = np.cumsum(np.bincount(dealt.ravel(), minlength=num_tasks))
    for keys in np.split(order, ends[:-1]):
        numbers, rows = np.divmod(keys, max(1, len(pictures.ids)))
        yield numbers.astype(np.uint16), pictures.at(rows)


def _search(tables: list[Table], distance: int, colour: float, *blocks: tuple[np.ndarray, Pictures]) -> Pairs:
    """Find the pairs among the rows of a task."""
    numbers = np.concatenate([number for number, _ in blocks])
    pictures = _joined([pictures for _, pictures in blocks])
    copies = []

    def compared() -> Iterator[np.ndarray]:
        for number, table in enumerate(tables):
            firsts, found = _collapse(_sorted_by_id(pictures.at(numbers == number)))
            if number == 0:  # copies agree in every table, and belong to the first like any pair
                copies.append(found)
            yield from _compare(firsts, table, distance, colour)

    return _sorted_pairs(_limited(compared()), copies)


def _joined(blocks: Sequence[Pictures]) -> Pictures:
    return Pictures(*map(np.concatenate, zip(*blocks, strict=True)))


def _sorted_by_id(pictures: Pictures) -> Pictures:
    return pictures.at(np.argsort(pictures.ids))


def _mix(keys: np.ndarray) -> np.ndarray:
    """Mix uint64 keys one-to-one, every bit depending on all: splitmix64 (Steele et al., OOPSLA 2014)."""
    keys = (keys ^ (keys >> 30)) * 0xBF58476D1CE4E5B9
    keys = (keys ^ (keys >> 27)) * 0x94D049BB133111EB
    return keys ^ (keys >> 31)


def _collapse(pictures: Pictures) -> tuple[Pictures, np.ndarray]:
    """Split pictures in ID order into those that are not copies, and the pairs (first, copy)."""
    by_hash = np.argsort(pictures.hashes)
    repeats = np.diff(pictures.hashes[by_hash]) == 0
    shared = np.zeros(len(by_hash), bool)  # only a hash that occurs again can be a copy's
    shared[by_hash[1:][repeats]] = shared[by_hash[:-1][repeats]] = True
    rows = np.flatnonzero(shared)
    colours = np.ascontiguousarray(pictures.colours[rows]).view(np.uint64)
    words = np.column_stack([pictures.hashes[rows], colours])
    order = np.lexsort(words.T)  # stable: of equal rows the first remains first
    is_copy = np.concatenate([[False], (words[order[1:]] == words[order[:-1]]).all(axis=1)])[: len(rows)]
    first = np.maximum.accumulate(np.where(is_copy, 0, np.arange(len(rows))))
    firsts = np.delete(np.arange(len(by_hash)), rows[order[is_copy]])
    pairs = np.column_stack([rows[order[first[is_copy]]], rows[order[is_copy]]])
    return pictures.at(firsts), pictures.ids[pairs]


def _compare(pictures: Pictures, table: Table, distance: int, colour: float) -> Iterator[np.ndarray]:
    """Yield the ID pairs (int64, M x 2) of near duplicates that belong to `table`, in chunks."""
    tolerance = int(colour * COLOUR_RANGE)
    sums = pictures.colours.sum(axis=1, dtype=np.uint64)
    # Rows are sorted by key, then by colour sum. Keys that agree in the remaining bits are separated below.
    sorting = (_mix(pictures.hashes & table.key) >> SUM_BITS << SUM_BITS) | sums
    order = np.argsort(sorting)
    ids, hashes, colours = pictures.at(order)
    for left, right in _candidates(sorting[order], tolerance):
        differing = hashes[left] ^ hashes[right]
        near = (np.bitwise_count(differing) <= distance) & (differing & table.key == 0)
        for mask in table.before:
            near &= differing & mask != 0
        left, right = left[near], right[near]
        # uint8 cannot hold a negative difference.
        low, high = np.minimum(colours[left], colours[right]), np.maximum(colours[left], colours[right])
        alike = (high - low).sum(axis=1, dtype=np.uint16) <= tolerance
        yield np.sort(np.column_stack([ids[left[alike]], ids[right[alike]]]), axis=1)


def _candidates(values: np.ndarray, tolerance: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield pairs of positions in the sorted `values` (uint64) that are within `tolerance`, in chunks."""
    rows = np.flatnonzero(np.diff(values) <= tolerance)
    counts = np.searchsorted(values, values[rows] + tolerance, side="right") - rows - 1
    steps = np.cumsum(counts) // CANDIDATES_AT_ONCE
    for step in np.split(np.arange(len(rows)), np.flatnonzero(np.diff(steps)) + 1):
        left, count = rows[step], counts[step]
        skipped = np.repeat(np.cumsum(count) - count, count)
        left = np.repeat(left, count)
        yield left, left + 1 + np.arange(len(left)) - skipped


def _limited(found: Iterator[np.ndarray]) -> list[np.ndarray]:
    """Collect the arrays of pairs, up to a task's limit."""
    arrays, num_pairs = [np.empty((0, 2), np.int64)], 0
    for pairs in found:
        arrays.append(pairs)
        num_pairs += len(pairs)
        if num_pairs > MAX_PAIRS:
            raise ConfigError(
                f"data.cleaning: more than {MAX_PAIRS} pairs of near duplicates: lower duplicate_distance or "
                "duplicate_colour, raise min_contrast, or set duplicates: ignore"
            )
    return arrays


def _sorted_pairs(near: list[np.ndarray], copies: list[np.ndarray]) -> Pairs:
    return Pairs(*(pairs[np.lexsort(pairs.T[::-1])] for pairs in map(np.concatenate, (near, copies))))
