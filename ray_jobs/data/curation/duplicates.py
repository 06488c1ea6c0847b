"""Near duplicates of a whole set: which pairs of pictures are alike, and what becomes of them.

Two pictures are near duplicates if their 64-bit perceptual hashes differ in at most `distance` bits and
the mean absolute difference of their colours (mean RGB of 4 x 4 fields, 48 bytes) is at most `colour` of
the full range.

The search is that of Manku, Jain & Das Sarma, "Detecting near-duplicates for web crawling" (WWW 2007): cut
the 64 bits into distance + k blocks. Hashes that differ in `distance` bits differ in that many blocks at
most, so they agree in k of them at least: for each choice of k blocks a table, keyed by their bits, in
which only rows of equal keys are compared. A pair belongs to the table of the first k blocks it agrees in
and is found there alone.

Cost of N rows: N x tables keys are made, sorted and, between machines, moved (66 bytes each); hashes that
are well spread take tables x N^2 / 2^(key bits + 1) comparisons. A larger k makes more tables of longer
keys, so k is what costs least for N and the distance: at distance 4 and a million rows k = 2, 15 tables of
21 bits; at distance 0 always one table of all 64. Of equal keys, only rows whose mean colour lies within
the tolerance are compared (a difference of means is at most the mean difference), and copies, alike in
every bit of hash and colours, stand for one row. So a task's memory grows with its rows and the pairs that
it finds, never with the square of a key's rows; its time does where many hashes are the same although the
pictures are no copies: one to four minutes for 100,000. Pictures that are alike but no copies do all form
pairs: m of them m^2 / 2, of which a task takes at most `MAX_PAIRS`.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ray_jobs.config import ConfigError

HASH_BITS = 64
COLOUR_RANGE = 48 * 255  # of the sum of a picture's colours, and of the summed difference of two
# Room for a colour sum and a tolerance added to it, in the low bits of a sorting key.
SUM_BITS = 15
# What comparing with one row of the same key costs, of what making and sorting a key costs. Measured: 0.004
# where mean colours are spread evenly, 0.03 where all are the same; hashes of real pictures are less spread.
COMPARISON_COST = 0.02
CANDIDATES_AT_ONCE = 1 << 19  # pairs compared in one step; two copies of their colours are 50 MB
MAX_PAIRS = 1 << 25  # that one task may find: 1.7 GiB while they are sorted
KEYS_A_TASK = 1 << 22  # 264 MiB of rows


class Pictures(NamedTuple):
    """What the search knows of N pictures: ids, hashes, colours."""

    ids: np.ndarray  # int64, N: unique; their order is that of the set
    hashes: np.ndarray  # uint64, N
    colours: np.ndarray  # uint8, N x 48

    def at(self, rows: np.ndarray) -> "Pictures":
        return Pictures(*(column[rows] for column in self))


@dataclass(frozen=True)
class Pairs:
    """All near duplicates of a set, by the ids of their pictures, smaller first, sorted.

    Copies have the same hash and colours, and thus the same near duplicates. They are named once, with the
    first of them; `near` holds the pairs among pictures that are no copies.
    """

    near: np.ndarray  # int64, M x 2
    copies: np.ndarray  # int64, K x 2: the first, its copy


@dataclass(frozen=True)
class Table:
    """Some of the blocks that the hash is cut into: `key` their bits, `before` the masks of the blocks that
    stand before the last of them and are not among them."""

    key: np.uint64
    before: tuple[np.uint64, ...]


def make_tables(distance: int, agreeing: int) -> list[Table]:
    """A table for each choice of `agreeing` of the distance + agreeing blocks of the 64 bits.

    Hashes within `distance` have equal keys in one table at least; in exactly one of those they also
    differ in each block of `before`.
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
    """How many blocks shall agree (the paper's k), so that keys and comparisons together cost least."""

    def cost(agreeing: int) -> float:
        num_blocks = distance + agreeing
        rows_a_key = num_rows / 2 ** (HASH_BITS * agreeing / num_blocks)
        return math.comb(num_blocks, agreeing) * (1 + COMPARISON_COST * rows_a_key)

    return min(range(1, 5), key=cost)


def near_pairs(
    hashes: np.ndarray, colours: np.ndarray, *, distance: int, colour: float, agreeing: int | None = None
) -> Pairs:
    """The near duplicates of a set, in this process; ids are positions.

    Args:
        hashes: uint64, N.
        colours: uint8, N x 48.
        distance: bits, 0 to 8.
        colour: share of the full range, 0 to 1.
        agreeing: the paper's k; else the one of least cost.

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
    """The near duplicates of a set, by Ray tasks: what `near_pairs` finds, with the ids of the parts.

    A task reads each part and another deals its rows, once a table, to as many tasks as there are
    `keys_a_task` keys; each of these compares what has equal keys. A small set is compared by one task. Only
    the pairs come here.

    Args:
        parts: at least one; each is called inside a task and returns its pictures.
        distance: bits, 0 to 8.
        colour: share of the full range, 0 to 1.
        keys_a_task: 66 bytes each; a task takes 1.3 times that beside them, six times if all are copies.

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
        found = [ray.remote(_search_all).remote(distance, colour, *blocks)]
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


def _search_all(distance: int, colour: float, *blocks: Pictures) -> Pairs:
    ids, hashes, colours = _sorted_by_id(_joined(blocks))
    found = near_pairs(hashes, colours, distance=distance, colour=colour)
    return Pairs(ids[found.near], ids[found.copies])


def _deal(pictures: Pictures, tables: list[Table], num_tasks: int) -> Iterator[tuple[np.ndarray, Pictures]]:
    """For each task the rows that it compares, with the number of the table (uint16) each is in.

    A key goes to the same task from every part. One that many hashes share, such as 0, goes to another
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
    """The pairs among the rows that were dealt to a task."""
    numbers = np.concatenate([number for number, _ in blocks])
    pictures = _joined([pictures for _, pictures in blocks])
    copies = []

    def compared() -> Iterator[np.ndarray]:
        for number, table in enumerate(tables):
            firsts, found = _collapse(_sorted_by_id(pictures.at(numbers == number)))
            if number == 0:  # copies meet in every table, and belong to the first like any pair
                copies.append(found)
            yield from _compare(firsts, table, distance, colour)

    return _sorted_pairs(_limited(compared()), copies)


def _joined(blocks: Sequence[Pictures]) -> Pictures:
    return Pictures(*map(np.concatenate, zip(*blocks, strict=True)))


def _sorted_by_id(pictures: Pictures) -> Pictures:
    return pictures.at(np.argsort(pictures.ids))


def _mix(keys: np.ndarray) -> np.ndarray:
    """uint64 to uint64, one to one, every bit depending on all: splitmix64 (Steele et al., OOPSLA 2014)."""
    keys = (keys ^ (keys >> 30)) * 0xBF58476D1CE4E5B9
    keys = (keys ^ (keys >> 27)) * 0x94D049BB133111EB
    return keys ^ (keys >> 31)


def _collapse(pictures: Pictures) -> tuple[Pictures, np.ndarray]:
    """Of pictures in the order of their ids: those that are no copies, and the pairs (first, copy)."""
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
    """The pairs of ids, int64 M x 2, that are near duplicates and belong to `table`, some at a time."""
    tolerance = int(colour * COLOUR_RANGE)
    sums = pictures.colours.sum(axis=1, dtype=np.uint64)
    # Rows of one key side by side, by their colours' sum. Two keys that agree in the bits left of them are
    # told apart below.
    sorting = (_mix(pictures.hashes & table.key) >> SUM_BITS << SUM_BITS) | sums
    order = np.argsort(sorting)
    ids, hashes, colours = pictures.at(order)
    for left, right in _candidates(sorting[order], tolerance):
        differing = hashes[left] ^ hashes[right]
        near = (np.bitwise_count(differing) <= distance) & (differing & table.key == 0)
        for mask in table.before:
            near &= differing & mask != 0
        left, right = left[near], right[near]
        # uint8 has no room for a negative difference.
        low, high = np.minimum(colours[left], colours[right]), np.maximum(colours[left], colours[right])
        alike = (high - low).sum(axis=1, dtype=np.uint16) <= tolerance
        yield np.sort(np.column_stack([ids[left[alike]], ids[right[alike]]]), axis=1)


def _candidates(values: np.ndarray, tolerance: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of positions in the sorted `values` (uint64) that lie within `tolerance`, some at a time."""
    rows = np.flatnonzero(np.diff(values) <= tolerance)
    counts = np.searchsorted(values, values[rows] + tolerance, side="right") - rows - 1
    steps = np.cumsum(counts) // CANDIDATES_AT_ONCE
    for step in np.split(np.arange(len(rows)), np.flatnonzero(np.diff(steps)) + 1):
        left, count = rows[step], counts[step]
        skipped = np.repeat(np.cumsum(count) - count, count)
        left = np.repeat(left, count)
        yield left, left + 1 + np.arange(len(left)) - skipped


def _limited(found: Iterator[np.ndarray]) -> list[np.ndarray]:
    """The arrays of pairs, as long as a task can hold them."""
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
