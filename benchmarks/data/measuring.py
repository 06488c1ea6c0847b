"""How the parts measure: in processes of their own, and the peak memory of all processes."""

import multiprocessing
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import ParamSpec, TypeVar

import psutil

from ray_jobs.console import quiet_logs

P = ParamSpec("P")
R = TypeVar("R")


def in_fresh_process(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """`function` in a new Python process, the frameworks' output in a file; raises what it raises."""
    with ProcessPoolExecutor(
        1, mp_context=multiprocessing.get_context("spawn"), initializer=quiet_logs
    ) as pool:
        return pool.submit(function, *args, **kwargs).result()


def tree_memory() -> int:
    """Bytes of this process and all below it: proportional set sizes (PSS), so that a page that several
    share is counted once. A process that ends meanwhile is not counted."""
    total = 0
    root = psutil.Process()
    for process in [root, *root.children(recursive=True)]:
        try:
            total += process.memory_full_info().pss
        except psutil.NoSuchProcess:
            continue
    return total


class PeakMemory:
    """The largest `tree_memory` while a block lasts, sampled by a thread.

    Args:
        interval: seconds between samples.

    Attributes:
        mib: in MiB.
        processes: the most that there were at once.
    """

    def __init__(self, interval: float = 0.5) -> None:
        self.interval = interval
        self.mib, self.processes = 0.0, 0
        self._done = threading.Event()
        self._sampler = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "PeakMemory":
        self._sample()
        self._sampler.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._sampler.join()
        self._sample()

    def _watch(self) -> None:
        while not self._done.wait(self.interval):
            self._sample()

    def _sample(self) -> None:
        self.mib = max(self.mib, tree_memory() / 2**20)
        self.processes = max(self.processes, 1 + len(psutil.Process().children(recursive=True)))
