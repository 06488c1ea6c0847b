"""The distributed duplicate search finds what one process finds."""

from functools import partial

import numpy as np

from cluster.local import LocalCluster
from ray_jobs.data.curation.duplicates import Pictures, find_near_pairs, near_pairs


def test_a_search_in_many_tasks_or_one_finds_the_pairs_of_a_single_process(
    ray_cluster: LocalCluster,
) -> None:
    draw = np.random.default_rng(0)
    hashes = draw.integers(0, 2**64, 30_000, dtype=np.uint64)
    colours = draw.integers(0, 256, (30_000, 48), np.uint8)
    hashes[20_000:20_400], colours[20_000:20_400] = hashes[:400] ^ np.uint64(0b1001), colours[:400]
    hashes[25_000:25_400], colours[25_000:25_400] = hashes[200:600], colours[200:600]
    hashes[26_000:26_500], colours[26_000:26_500] = 0, 7
    expected = near_pairs(hashes, colours, distance=4, colour=0.04)
    assert len(expected.near) == 400 and len(expected.copies) == 400 + 499

    def part(ids: np.ndarray) -> Pictures:
        return Pictures(ids, hashes[ids], colours[ids])

    ids = draw.permutation(30_000)
    parts = [partial(part, some) for some in np.split(ids, [7_000, 7_000, 22_000])]
    for keys_a_task in (30_000, 1 << 20):
        found = find_near_pairs(parts, distance=4, colour=0.04, keys_a_task=keys_a_task)
        np.testing.assert_array_equal(found.near, expected.near)
        np.testing.assert_array_equal(found.copies, expected.copies)
