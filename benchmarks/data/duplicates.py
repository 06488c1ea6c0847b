"""The search for near duplicates, in one process and by Ray tasks, against comparing all pairs."""

import math
import resource
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from benchmarks.data.measuring import PeakMemory, in_fresh_process, tree_memory
from cluster.connect import joined
from cluster.local import local_cluster
from ray_jobs.config import CleaningConfig, LocalConfig
from ray_jobs.data.curation.duplicates import (
    COLOUR_RANGE,
    KEYS_A_TASK,
    Pairs,
    Pictures,
    find_near_pairs,
    least_cost,
    make_tables,
    near_pairs,
)

COUNTS = {"smoke": 5_000, "full": 100_000}
PLANTED = 0.01  # share of the pictures that are near duplicates of one of the others
DISTANCE = CleaningConfig().duplicate_distance
COLOUR = CleaningConfig().duplicate_colour
ROWS_A_PART = 10_000
NUM_TASKS = 4  # that a set is dealt to which one task could search as well
COMPARED_AT_ONCE = 1 << 20


def run(size: str) -> dict[str, Any]:
    count = COUNTS[size]
    searches = {
        "near_pairs": partial(alone, search),
        "find_near_pairs": partial(on_ray, KEYS_A_TASK),
        f"{NUM_TASKS} tasks": partial(on_ray, _keys_a_task(count)),
        "brute force": partial(alone, brute_force),
    }
    figures = {}
    for name, measured in searches.items():
        figures[name] = in_fresh_process(measured, count)
        seconds, mib = figures[name]["seconds"], figures[name]["mib"]
        print(f"{name:>16}: {seconds:8.2f} s, {mib:5.0f} MiB more than before", flush=True)
    rival = figures["brute force"]["seconds"]
    ratios = {name: rival / figures[name]["seconds"] for name in searches if name != "brute force"}
    print(
        f"ratio: of {count:,} hashes all {int(count * PLANTED):,} planted pairs are found, "
        f"{ratios['near_pairs']:.0f} times as fast as by comparing all (numpy), "
        f"by Ray tasks {ratios['find_near_pairs']:.0f} times",
        flush=True,
    )
    return {"pictures": count, "distance": DISTANCE, "colour": COLOUR, "figures": figures, "ratios": ratios}


def _keys_a_task(count: int) -> int:
    return math.ceil(count * len(make_tables(DISTANCE, least_cost(DISTANCE, count))) / NUM_TASKS)


def planted(count: int) -> tuple[Pictures, np.ndarray]:
    """Random pictures, the last of which are near duplicates of the first; and these pairs, K x 2."""
    draw = np.random.default_rng(0)
    number = int(count * PLANTED)
    hashes = draw.integers(0, 2**64, count, np.uint64)
    colours = draw.integers(0, 256, (count, 48), np.uint8)
    turned = np.uint64(1) << draw.integers(0, 64, (DISTANCE, number), np.uint64)
    hashes[-number:] = hashes[:number] ^ np.bitwise_or.reduce(turned)  # DISTANCE bits differ, or fewer
    shift = draw.integers(-10, 11, (number, 48))  # 5.2 on average, about 0.02 of the range
    colours[-number:] = np.clip(colours[:number] + shift, 0, 255)
    pairs = np.column_stack([np.arange(number), np.arange(count - number, count)])
    return Pictures(np.arange(count), hashes, colours), pairs


def _require_all(found: Pairs, pairs: np.ndarray) -> None:
    there = {tuple(pair) for pair in np.concatenate([found.near, found.copies]).tolist()}
    assert there.issuperset(map(tuple, pairs.tolist())), "a planted near duplicate was not found"


def search(pictures: Pictures) -> Pairs:
    return near_pairs(pictures.hashes, pictures.colours, distance=DISTANCE, colour=COLOUR)


def brute_force(pictures: Pictures) -> Pairs:
    """Every picture with every later one: hashes first, colours of those that are near."""
    count = len(pictures.ids)
    found = []
    rows = max(1, COMPARED_AT_ONCE // count)
    for start in range(0, count, rows):
        left = pictures.hashes[start : start + rows, None]
        near = np.bitwise_count(left ^ pictures.hashes[None, start:]) <= DISTANCE
        found.append(np.argwhere(near) + start)
    pairs = np.concatenate(found)
    pairs = pairs[pairs[:, 0] < pairs[:, 1]]
    one, other = (pictures.colours[pairs[:, side]].astype(np.int16) for side in (0, 1))
    alike = np.abs(one - other).sum(axis=1) <= COLOUR * COLOUR_RANGE
    return Pairs(pairs[alike], np.empty((0, 2), np.int64))


def alone(function: Callable[[Pictures], Pairs], count: int) -> dict[str, Any]:
    """A search in this process: seconds, and MiB that its peak rose by."""
    pictures, pairs = planted(count)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    found = function(pictures)
    seconds = time.perf_counter() - start
    mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10
    _require_all(found, pairs)
    return {"seconds": seconds, "mib": mib, "pairs": len(found.near) + len(found.copies)}


def on_ray(keys_a_task: int, count: int) -> dict[str, Any]:
    """A search by Ray tasks, twice: seconds of the second, whose workers are there; and how many MiB more all
    processes took, new workers included."""
    pictures, pairs = planted(count)
    parts = [
        partial(Pictures, *(column[start : start + ROWS_A_PART] for column in pictures))
        for start in range(0, count, ROWS_A_PART)
    ]
    seconds = {}
    with local_cluster(LocalConfig()) as cluster, joined(cluster.gcs_address):
        before = tree_memory() / 2**20
        with PeakMemory(0.1) as peak:
            for turn in ("first", "second"):
                start = time.perf_counter()
                found = find_near_pairs(parts, distance=DISTANCE, colour=COLOUR, keys_a_task=keys_a_task)
                seconds[turn] = time.perf_counter() - start
    _require_all(found, pairs)
    return {
        "seconds": seconds["second"],
        "seconds_first": seconds["first"],
        "mib": peak.mib - before,
        "pairs": len(found.near) + len(found.copies),
    }
