"""CPU cores that each compute their own share of a batch.

PyTorch splits each operation over all cores, which wait for each other at its end, thousands of times per
denoiser call. If another process takes one core for a moment, all the others wait. Rows that are computed
apart wait once per call.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from math import ceil
from typing import TypeVar

import torch

T = TypeVar("T")

ENOUGH = 0.8  # least utilization of the cores for computing apart; below, all work on all rows together


class CPUWorkers:
    """Threads that compute with one core each, and one thread that computes with all cores.

    Args:
        number: number of cores; None: compute in the calling thread, with PyTorch's own thread count.
        share_out: allow rows to be computed apart.
    """

    def __init__(self, number: int | None = None, *, share_out: bool = True) -> None:
        self.number, self.num_shares = number, number if number and share_out else 1
        self._apart = ThreadPoolExecutor(number, "core", initializer=_take_one)
        self._together = ThreadPoolExecutor(1, "cores")

    def take(self) -> None:
        """Reserve the cores for these threads: limit the calling thread, and every thread of the process that
        starts computing later, to one core.

        Each computing thread gets OpenMP threads of its own, which live as long as it does; the square root
        of a few numbers is enough. With more of them than cores, libgomp lets all of them sleep at the end of
        each operation instead of spinning, and a denoiser on two cores is a quarter slower. Otherwise they
        spin beside the working threads.
        """
        if self.number is not None:
            self._together.submit(_take, self.number).result()
            _take_one()

    def shares(self, rows: int) -> list[slice]:
        """Split N rows evenly, one slice per core; return a single slice if too many cores would be idle."""
        number = self.num_shares
        if rows < ENOUGH * number * ceil(rows / number):
            return [slice(0, rows)]
        ends = [rows * place // number for place in range(number + 1)]
        return [slice(start, end) for start, end in zip(ends, ends[1:], strict=False)]

    def apart(self, work: Callable[[slice], torch.Tensor], rows: int) -> torch.Tensor:
        """Run `work` on each share of N rows, and return the concatenated outputs, N x ...."""
        shares = self.shares(rows)
        if len(shares) == 1:
            return self.together(partial(work, shares[0]))
        return torch.cat(list(self._apart.map(partial(_inferred, work), shares)))

    def together(self, work: Callable[[], T]) -> T:
        """Return the result of `work`, computed with all cores."""
        return work() if self.number is None else self._together.submit(_inferred, work).result()

    def close(self) -> None:
        """Stop the threads."""
        self._apart.shutdown()
        self._together.shutdown()


def _take(number: int) -> None:
    torch.get_num_threads()  # else a thread's first computation would reset it to the process's number
    torch.set_num_threads(number)  # for this thread and the process


def _take_one() -> None:
    _take(1)


def _inferred(work: Callable[..., T], *arguments: slice) -> T:
    """Run `work` in inference mode, which is per thread."""
    with torch.inference_mode():
        return work(*arguments)
