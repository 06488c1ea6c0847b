"""Nodes join, are taken away and die: the losses are those of a quiet training."""

import json
import os
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from cluster.local import ONE_MACHINE, LocalCluster
from ray_jobs.config import Config
from ray_jobs.data.preparation import prepare
from ray_jobs.training.checkpoint import SERIES, folder_of
from tests.faults.elastic_run import GRACE_S, checkpoints, trial
from tests.plain_training import PlainTraining
from tests.ray.test_training import tiny_config
from tests.record import record_fault

EVENTS = ["one node", "a node joined", "a node will be taken away", "the node died"]


def start(config: Config, folder: Path) -> subprocess.Popen[str]:
    """`elastic_run` on a cluster of its own; its errors go to a file."""
    written = folder / "elastic.yaml"
    written.write_text(config.to_yaml())
    ours = {"RAY_ADDRESS", "RAY_JOB_ID", *ONE_MACHINE}
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    return subprocess.Popen(
        [sys.executable, "-m", "tests.faults.elastic_run", str(written)],
        env=environment | {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "30"},  # how long a dead node is asked
        stdout=subprocess.PIPE,
        stderr=(folder / "elastic.log").open("w"),
        text=True,
    )


def curve(config: Config) -> list[tuple[int, float]]:
    """(step, loss) of all steps that whole checkpoints tell; repeated ones as often as they were."""
    folder = trial(config)
    series = [json.loads(folder.child(folder_of(step)).read_text(SERIES)) for step in checkpoints(config)]
    return [(row["step"], row["loss"]) for rows in series for row in rows]


def test_a_training_goes_on_with_fewer_and_more_nodes(
    ray_cluster: LocalCluster, tiny_model: Path, picture_folder: Path, tmp_path: Path
) -> None:
    def config(**train: Any) -> Config:
        overrides = [f"train.{name}={value}" for name, value in train.items()]
        return tiny_config(tiny_model, picture_folder, tmp_path, *overrides)

    # Full training, of which one worker shards nothing, and two do.
    elastic = config(
        method="full", num_workers=[1, 2], cpus_per_worker=2, checkpoint_minutes=0.1, max_failures=3
    )
    dataset = prepare(elastic)
    endless = elastic.model_copy(update={"search": elastic.search.model_copy(update={"ladder": [10**5]})})
    driver = start(endless, tmp_path)
    assert driver.stdout is not None
    lines = (line for line in driver.stdout if line.startswith("{"))
    try:
        told = [json.loads(line) for line in islice(lines, len(EVENTS))]
    finally:
        driver.kill()
        driver.wait()
    assert [line["event"] for line in told] == EVENTS
    assert [line["world_size"] for line in told] == [1, 2, 2, 1]
    assert told[2]["seconds"] < GRACE_S

    for line in told[1:]:
        lost = f"{line['again']} steps, taken again" if line["again"] else "no step"
        record_fault(f"training: {line['event']}", recovery_s=line["seconds"], lost=lost)
    found = curve(elastic)
    last = max(step for step, _ in found)
    assert {step for step, _ in found} == set(range(1, last + 1))
    quiet = PlainTraining(elastic, dataset).run(last)
    for step, loss in found:
        assert loss == pytest.approx(quiet[step - 1], abs=1e-4), step
