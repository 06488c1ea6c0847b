"""A training on a cluster of several nodes that join, are taken away and die while it runs.

    python -m tests.faults.elastic_run CONFIG

Adds a node, announces that it will be taken away, and kills it; each time it waits until a checkpoint shows
that the training went on, and prints a line of JSON about it. It then waits to be killed.
"""

import json
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import ray
from ray.cluster_utils import Cluster

from cluster.storage import Storage
from ray_jobs.config import Config, load_config
from ray_jobs.prepare import prepare
from ray_jobs.train import build_trainer, training_name
from ray_jobs.training.checkpoint import folder_of, read_progress, steps_of

# The head has room for what reads the data, not for a worker, which takes two CPUs.
NODE = {"object_store_memory": 100 << 20, "include_dashboard": False}
HEAD_NODE = NODE | {"num_cpus": 1}
WORKER_NODE = NODE | {"num_cpus": 2}
GRACE_S = 60
PATIENCE_S = 300


def checkpoints(config: Config) -> dict[int, dict[str, Any]]:
    """What progress.json says in the whole checkpoints of the training, by step."""
    folder = trial(config)
    found = {step: read_progress(folder.child(folder_of(step))) for step in steps_of(folder)}
    return {step: progress for step, progress in found.items() if progress}


def trial(config: Config) -> Storage:
    """Where the training's checkpoints lie."""
    return Storage.open(config.storage).child(config.name, "train", training_name(config))


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
    cluster.add_node(**WORKER_NODE)
    threading.Thread(target=run, args=(config,), daemon=True).start()
    wait_for(config, "one node", lambda progress: progress["world_size"] == 1)
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
    cluster.remove_node(joined, allow_graceful=False)
    wait_for(config, "the node died", lambda progress: progress["world_size"] == 1)
    time.sleep(PATIENCE_S)


def run(config: Config) -> None:
    """The training, as its stage runs it; its data are prepared already."""
    build_trainer(config, prepare(config), name=training_name(config)).fit()


def main() -> None:
    config = load_config(sys.argv[1])
    cluster = Cluster(initialize_head=True, head_node_args=HEAD_NODE)
    cluster.connect()
    disturb(cluster, config)


if __name__ == "__main__":
    main()
