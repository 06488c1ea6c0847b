"""The embedded Ray's workers begin with everything imported, unless one has variables of its own."""

import time

import psutil

from cluster.forkserver import MODULES
from cluster.local import LocalCluster


def test_a_worker_is_a_copy_of_what_has_imported_everything(ray_cluster: LocalCluster) -> None:
    import ray

    def begin() -> tuple[list[str], set[str], str | None]:
        """The parent's command, what of `MODULES` is imported, and a variable."""
        import os
        import sys

        parent = psutil.Process(os.getppid()).cmdline()
        return parent, set(MODULES) & sys.modules.keys(), os.environ.get("HF_HUB_OFFLINE")

    fresh = ray.remote(max_calls=1)(begin)
    deadline = time.monotonic() + 300
    while True:
        parent, imported, _ = ray.get(fresh.remote())
        assert parent[1].endswith("cluster/forkserver.py")
        if imported == set(MODULES):
            break
        assert time.monotonic() < deadline, set(MODULES) - imported
    told = ray.get(fresh.options(runtime_env={"env_vars": {"HF_HUB_OFFLINE": "0"}}).remote())
    assert (told[1], told[2]) == (set(), "0")
    assert not told[0][1].endswith("cluster/forkserver.py")
