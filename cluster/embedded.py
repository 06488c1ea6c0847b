"""The process that runs the embedded Ray; started by `cluster.local.local_cluster`, not by hand.

It starts a head node with the settings given as one JSON argument, and stops it when its standard input
closes. The kernel closes that input whenever the parent ends, even if killed, so no Ray outlives its user.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def num_gpus() -> int:
    """Return the number of GPUs that this process may use; `Cluster`, unlike `ray.init`, defaults to none."""
    from ray._private.accelerators import get_accelerator_manager_for_resource

    manager = get_accelerator_manager_for_resource("GPU")
    visible = manager.get_current_process_visible_accelerator_ids()
    present: int = manager.get_current_node_num_accelerators()
    return present if visible is None else min(present, len(visible))


def main() -> None:
    settings = json.loads(sys.argv[1]) | {"num_gpus": num_gpus()}
    # Ctrl-C reaches every process of the terminal; the parent first stops its job and then closes the input.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    from ray.cluster_utils import Cluster

    forks = sys.platform == "linux"  # elsewhere a copy of a process that has imported much may not run
    if forks:
        settings["setup_worker_path"] = str(HERE / "start_worker.py")
    cluster = Cluster(initialize_head=True, head_node_args=settings)
    if forks:
        command = [sys.executable, str(HERE / "forkserver.py"), os.environ["DIFFRAY_FORKSERVER"]]
        subprocess.Popen(command, stdin=subprocess.PIPE)
    print(cluster.address, cluster.webui_url, cluster.head_node.get_logs_dir_path(), flush=True)
    sys.stdin.read()
    cluster.shutdown()


if __name__ == "__main__":
    main()
