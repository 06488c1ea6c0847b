"""A training on a cluster of several nodes that join, are taken away and die while it runs.

    python -m tests.faults.elastic_run CONFIG

Adds a node, announces that it will be taken away, and kills it; each time it waits until a checkpoint shows
that the training went on, and prints a line of JSON about it. It then waits to be killed.
"""

import json
import re
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import ray
from ray.cluster_utils import Cluster

from cluster.storage import Storage
from ray_jobs.config import Config, load_config
from ray_jobs.console.board import ProgressBoard
from ray_jobs.data.preparation import prepare
from ray_jobs.run.records import Progress
from ray_jobs.training.checkpoint import SERIES, folder_of, read_progress, steps_of
from ray_jobs.training.trainer import build_trainer, training_name

# The head has room for what reads the data, not for a worker, which takes two CPUs.
NODE = {"object_store_memory": 100 << 20, "include_dashboard": False}
HEAD_NODE = NODE | {"num_cpus": 1}
WORKER_NODE = NODE | {"num_cpus": 2}
GRACE_S = 60
PATIENCE_S = 300


def checkpoints(config: Config) -> dict[int, Progress]:
    """What progress.json says in the whole checkpoints of the training, by step."""
    folder = trial(config)
    found = {step: read_progress(folder.child(folder_of(step))) for step in steps_of(folder)}
    return {step: progress for step, progress in found.items() if progress}


def trial(config: Config) -> Storage:
    """Where the training's checkpoints lie."""
    return Storage.open(config.storage).child(config.name, "train", training_name(config))


class Steps:
    """What the training says on its board.

    Attributes:
        last: the last step that was told; it tells one every other second.
    """

    def __init__(self) -> None:
        self.board = ray.remote(num_cpus=0)(ProgressBoard).remote()
        self.last = 0

    def look(self) -> None:
        for line in ray.get(self.board.take.remote()):
            if step := re.search(r" step (\d+)/", line):
                self.last = int(step.group(1))


def wait_for(
    config: Config,
    steps: Steps,
    event: str,
    happen: Callable[[], Any],
    wanted: Callable[[Progress], bool],
) -> Any:
    """Let something happen, wait for a checkpoint after all present ones, and say which it was, how long it
    took, and how many steps were taken again. Returns what happened."""
    steps.look()
    before, begin = steps.last, time.monotonic()
    happened, last = happen(), max(checkpoints(config), default=0)
    while time.monotonic() - begin < PATIENCE_S:
        for step, progress in checkpoints(config).items():
            if step > last and wanted(progress):
                took = time.monotonic() - begin
                resumed = first_step(config, step) - 1
                told = {"seconds": took, "again": max(0, before - resumed)}
                print(json.dumps({"event": event, **told, **progress.fields()}), flush=True)
                return happened
        steps.look()
        time.sleep(0.1)
    raise TimeoutError(f"{event}: no such checkpoint within {PATIENCE_S} s")


def first_step(config: Config, step: int) -> int:
    """Of those that led to a checkpoint since the one before, or since its workers began."""
    return int(json.loads(trial(config).child(folder_of(step)).read_text(SERIES))[0]["step"])


def disturb(cluster: Cluster, config: Config) -> None:
    """What happens to the cluster's nodes while the training runs."""
    cluster.add_node(**WORKER_NODE)
    steps = Steps()
    wait_for(
        config,
        steps,
        "one node",
        lambda: threading.Thread(target=run, args=(config, steps.board), daemon=True).start(),
        lambda progress: progress.world_size == 1,
    )
    joined = wait_for(
        config,
        steps,
        "a node joined",
        lambda: cluster.add_node(**WORKER_NODE),
        lambda progress: progress.world_size == 2,
    )
    wait_for(
        config,
        steps,
        "a node will be taken away",
        lambda: announce(joined),
        lambda progress: progress.why == "preemption",
    )
    wait_for(
        config,
        steps,
        "the node died",
        lambda: cluster.remove_node(joined, allow_graceful=False),
        lambda progress: progress.world_size == 1,
    )
    time.sleep(PATIENCE_S)


def announce(node: Any) -> None:
    """Give notice that a node will be taken away."""
    from ray.core.generated import autoscaler_pb2

    ray._private.worker.global_worker.gcs_client.drain_node(
        node.node_id,
        autoscaler_pb2.DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION,
        "will be taken away",
        int((time.time() + GRACE_S) * 1000),
    )


def run(config: Config, board: Any) -> None:
    """The training, as its stage runs it; its data are prepared already."""
    build_trainer(config, prepare(config), name=training_name(config), board=board).fit()


def main() -> None:
    config = load_config(sys.argv[1])
    cluster = Cluster(initialize_head=True, head_node_args=HEAD_NODE)
    cluster.connect()
    disturb(cluster, config)


if __name__ == "__main__":
    main()
