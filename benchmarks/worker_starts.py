"""Time until a worker of the embedded Ray can train: as a copy of the forkserver, and by Ray's own start.

    python -m benchmarks.worker_starts [--workers 2] [--turns 5]

Both in one Ray, in turns: some workers are started together, import Stable Diffusion's pipeline, and end.
"""

import argparse
import time
from statistics import median
from typing import Any

from cluster.connect import joined
from cluster.forkserver import MODULES
from cluster.local import local_cluster
from ray_jobs.config import LocalConfig


def begin() -> tuple[int, bool]:
    """Import what a worker needs; return the MiB of memory that it alone has, and whether it was a copy."""
    import os

    import psutil
    from diffusers import StableDiffusionPipeline

    assert StableDiffusionPipeline
    command = psutil.Process(os.getppid()).cmdline()
    return psutil.Process().memory_full_info().uss // 2**20, command[1].endswith("forkserver.py")


def wait_for_imports() -> None:
    """Return once the forkserver has imported everything."""
    import ray

    def missing() -> bool:
        import sys

        return any(name not in sys.modules for name in MODULES)

    while ray.get(ray.remote(max_calls=1)(missing).remote()):
        time.sleep(0.5)


def start(workers: int, variable: dict[str, str]) -> tuple[float, list[tuple[int, bool]]]:
    """Start workers with a variable of theirs; return the seconds until all are ready, and what each says."""
    import ray

    task = ray.remote(max_calls=1)(begin).options(runtime_env={"env_vars": variable})
    began = time.perf_counter()
    told = ray.get([task.remote() for _ in range(workers)])
    return time.perf_counter() - began, told


def measure(workers: int, turns: int) -> None:
    found: dict[bool, list[tuple[float, Any]]] = {True: [], False: []}
    with (
        local_cluster(LocalConfig(num_cpus=workers, object_store_mb=80)) as cluster,
        joined(cluster.gcs_address),
    ):
        wait_for_imports()
        for turn in range(turns):
            # With a new value each time, so that no worker is used again; the second one forbids a copy.
            for copied, name in ((True, "DIFFRAY_TURN"), (False, "TURN")):
                seconds, told = start(workers, {name: str(turn)})
                assert all(was_copy is copied for _, was_copy in told)
                found[copied].append((seconds, median(mib for mib, _ in told)))
    print(f"{workers} workers at once, medians of {turns} turns")
    for copied, rows in found.items():
        seconds, mib = (median(column) for column in zip(*rows, strict=True))
        print(f"{'copies' if copied else 'own start'}: {seconds:.1f} s, {mib:.0f} MiB each of their own")
    ratio = median(own / copy for (copy, _), (own, _) in zip(found[True], found[False], strict=True))
    print(f"own start takes {ratio:.1f} times as long (median of turns)")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--turns", type=int, default=5)
    options = parser.parse_args()
    measure(options.workers, options.turns)


if __name__ == "__main__":
    main()
