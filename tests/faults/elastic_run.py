"""A training on a cluster of several nodes that die, join and are taken away while it runs.

    python -m tests.faults.elastic_run CONFIG

Kills a node, adds one and announces that it will be taken away; each time it waits until a checkpoint shows
that the training went on, and prints a line of JSON about it. It then waits to be killed.
"""

import json
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster

from ray_jobs.config import Config, load_config
from ray_jobs.prepare import prepare
from ray_jobs.train import build_trainer, trial_id
from ray_jobs.training.checkpoint import PROGRESS

# The head has room for what reads the data, not for a worker, which takes two CPUs.
HEAD_NODE = {"num_cpus": 1, "object_store_memory": 100 << 20}
WORKER_NODE = HEAD_NODE | {"num_cpus": 2}
GRACE_S = 60
PATIENCE_S = 300


def checkpoints(config: Config) -> dict[int, dict[str, Any]]:
    """What progress.json says in the whole checkpoints of the training, by step."""
    trial = Path(config.storage) / config.name / "train" / trial_id(config.train.learning_rate)
    found = {}
    for path in sorted(trial.glob(f"step-*/{PROGRESS}")):
        progress = json.loads(path.read_text())
        marks = len(list(path.parent.glob(f"complete-*-of-{progress['world_size']:04d}")))
        if marks == progress["world_size"]:
            found[int(progress["step"])] = progress
    return found


def wait_for(config: Config, event: str, wanted: Callable[[dict[str, Any]], bool]) -> None:
    """Wait for a checkpoint after all present ones, and say which it was and how long it took."""
    begin, last = time.monotonic(), max(checkpoints(config), default=0)
    while time.monotonic() - begin < PATIENCE_S:
        for step, progress in checkpoints(config).items():
            if step > last and wanted(progress):
                line = {"event": event, "seconds": time.monotonic() - begin, **progress}
                print(json.dumps(line), flush=True)
                return
        time.sleep(0.1)
    raise TimeoutError(f"{event}: no such checkpoint within {PATIENCE_S} s")


def disturb(cluster: Cluster, config: Config) -> None:
    """What happens to the cluster's nodes while the training runs."""
    first = cluster.add_node(**WORKER_NODE)
    cluster.add_node(**WORKER_NODE)
    threading.Thread(target=run, args=(config,), daemon=True).start()
    wait_for(config, "two nodes", lambda progress: progress["world_size"] == 2)
    cluster.remove_node(first, allow_graceful=False)
    wait_for(config, "a node died", lambda progress: progress["world_size"] == 1)
    joined = cluster.add_node(**WORKER_NODE)
    wait_for(config, "a node joined", lambda progress: progress["world_size"] == 2)
    from ray.core.generated import autoscaler_pb2

    ray._private.worker.global_worker.gcs_client.drain_node(
        joined.node_id,
        autoscaler_pb2.DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION,
        "will be taken away",
        int((time.time() + GRACE_S) * 1000),
    )
    wait_for(config, "a node will be taken away", lambda progress: progress["why"] == "preemption")
    time.sleep(PATIENCE_S)


def run(config: Config) -> None:
    """The training, as its stage runs it; its data are prepared already."""
    build_trainer(config, prepare(config), callbacks=[]).fit()


def main() -> None:
    config = load_config(sys.argv[1])
    cluster = Cluster(initialize_head=True, head_node_args=HEAD_NODE)
    cluster.connect()
    disturb(cluster, config)


if __name__ == "__main__":
    main()
