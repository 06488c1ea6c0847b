"""The embedded Ray on a machine that says it has GPUs."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

PRETEND = """
import sys

if any(each.endswith("cluster/embedded.py") for each in sys.orig_argv):
    from ray._private.accelerators.nvidia_gpu import NvidiaGPUAcceleratorManager

    NvidiaGPUAcceleratorManager.get_current_node_num_accelerators = staticmethod(lambda: {count})
"""
"""A sitecustomize in which the process that starts Ray counts GPUs that are not there."""

ON_RAY = """
import ray

from cluster.connect import joined
from cluster.local import local_cluster
from ray_jobs.config import LocalConfig

with local_cluster(LocalConfig(num_cpus=8, object_store_mb=80)) as cluster, joined(cluster.gcs_address):
{lines}
"""


def run_on_gpus(lines: str, count: int, folder: Path) -> list[str]:
    """Run statements on an embedded Ray with `count` pretended GPUs; return the lines that they print."""
    (folder / "sitecustomize.py").write_text(PRETEND.format(count=count))
    indented = "".join(f"    {line}\n" for line in lines.strip().splitlines())
    ours = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", ON_RAY.format(lines=indented)],
        cwd=ROOT,
        env=ours
        | {"PYTHONPATH": f"{folder}:{ROOT}", "CUDA_VISIBLE_DEVICES": ",".join(map(str, range(count)))},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()
