"""The process that holds the embedded Ray: run by `cluster.local.local_cluster`, not by hand.

It starts a head node with the settings given as one JSON argument, and stops it when its standard input
ends. The kernel ends it whenever the parent is gone, killed included, so no Ray outlives its user.
"""

import json
import signal
import sys


def num_gpus() -> int:
    """The GPUs that this process may use. `Cluster`, unlike `ray.init`, takes none unless told."""
    from ray._private.accelerators import get_accelerator_manager_for_resource

    manager = get_accelerator_manager_for_resource("GPU")
    visible = manager.get_current_process_visible_accelerator_ids()
    present: int = manager.get_current_node_num_accelerators()
    return present if visible is None else min(present, len(visible))


def main() -> None:
    settings = json.loads(sys.argv[1]) | {"num_gpus": num_gpus()}
    # A Ctrl-C goes to the whole terminal; the parent first stops its job and then closes the input.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args=settings)
    print(cluster.address, cluster.webui_url, cluster.head_node.get_logs_dir_path(), flush=True)
    sys.stdin.read()
    cluster.shutdown()


if __name__ == "__main__":
    main()
