"""The count of the denoiser steps that a search computes, over its starts."""

from pathlib import Path

import ray

from cluster.local import LocalCluster
from cluster.storage import Storage
from ray_jobs.console.board import watched_board
from ray_jobs.tuning.computed_steps import ComputedSteps, read_computed


def test_the_steps_of_all_starts_add_up_and_repeated_ones_count_again(
    ray_cluster: LocalCluster, tmp_path: Path
) -> None:
    storage = Storage.open(str(tmp_path))
    assert read_computed(storage) == {}
    for start in (1, 2):
        with watched_board() as board:
            computed = ComputedSteps(storage, board)
            for training in ("a", "a", "b"):
                ray.get(board.count.remote(training))
            assert computed.take() == {"a": 2 * start, "b": start}
            assert computed.take() == {"a": 2 * start, "b": start}, "what was taken is not taken again"
    assert read_computed(storage) == {"a": 4, "b": 2}
    assert ComputedSteps(storage, None).take() == {"a": 4, "b": 2}
