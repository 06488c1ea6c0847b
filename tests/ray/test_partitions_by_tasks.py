"""Decisions by Ray tasks are those of one process, also when a task dies with its process while rows meet."""

import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

from cluster.local import LocalCluster
from cluster.storage import Storage
from ray_jobs.data.curation.copies import Block, Copies, find_copies
from ray_jobs.data.curation.decisions import decide_rows
from ray_jobs.data.curation.judging import Judge
from ray_jobs.data.curation.rows import gather_rows
from ray_jobs.data.curation.workers import InProcess, RayTasks, Workers
from ray_jobs.data.encoding.outlines import outline
from ray_jobs.data.encoding.plan import Planner, chunks
from tests.unit.test_partitions import configured, drawn, in_files


def test_tasks_decide_as_one_process_does(ray_cluster: LocalCluster, tmp_path: Path) -> None:
    config, index = configured("data.folds=3"), Storage.open(str(tmp_path / "index"))
    entries = in_files(index, [row for seed in range(8) for row in drawn(seed)], 0)
    found = []
    ways: dict[str, Workers] = {"process": InProcess(), "tasks": RayTasks(at_once=2)}
    for name, workers in ways.items():
        dataset = Storage.open(str(tmp_path / name))
        rows = gather_rows(entries, index, dataset, bytes_a_run=1, workers=workers)
        assert len(rows.runs) == len(entries)
        decided = decide_rows(config, rows, len(rows), dataset, workers, 4)
        planner = Planner.of(config, decided, [(64, 64)])
        parts = outline(planner, chunks(entries, decided), len(rows), workers)
        labels = decided.reasons.tolist(), decided.splits.tolist(), decided.folds.tolist()
        found.append((*labels, decided.matches.pairs(), decided.num_captions, parts))
    assert found[0] == found[1] and found[0][3]


def test_a_partition_whose_process_is_killed_is_joined_again(
    ray_cluster: LocalCluster, tmp_path: Path
) -> None:
    config, index = configured(), Storage.open(str(tmp_path / "index"))
    entries = in_files(index, [row for seed in range(4) for row in drawn(seed)], 0)
    dataset = Storage.open(str(tmp_path / "set"))
    rows = gather_rows(entries, index, dataset, bytes_a_run=1, workers=InProcess())
    judge, marker = Judge(config, rows.for_tasks(), dataset, 4), tmp_path / "killed"

    def dying(blocks: Sequence[Block]) -> Copies:
        """Find copies; the first call kills its process."""
        try:
            marker.touch(exist_ok=False)
            os.kill(os.getpid(), signal.SIGKILL)
        except FileExistsError:
            pass
        return find_copies(blocks)

    def joined(workers: Workers, find: Callable[[Sequence[Block]], Copies]) -> list[list[list[int]]]:
        copies = list(workers.shuffle(judge, rows.runs, find, 4)[1])
        return [sorted(each.later.tolist()) + sorted(each.repeated.tolist()) for each in copies]

    assert joined(RayTasks(), dying) == joined(InProcess(), find_copies)
    assert marker.exists()
