"""A CPU's cores, each of which computes a share of a batch by itself.

PyTorch has all cores work on each operation in turn and wait for each other at its end, thousands of times
in a call of a denoiser. A core that another process takes for a moment is waited for by all the others. Rows
that are computed apart wait once a call.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from math import ceil
from typing import TypeVar

import torch

T = TypeVar("T")

ENOUGH = 0.8  # of the cores' time has to go to rows: with less, all work on all rows together


class CPUWorkers:
    """Threads that compute with one core each, and one that computes with all.

    Args:
        number: of cores; None: who asks computes, with as many as PyTorch has given him.
        share_out: whether rows may be computed apart.
    """

    def __init__(self, number: int | None = None, *, share_out: bool = True) -> None:
        self.number, self.num_shares = number, number if number and share_out else 1
        self._apart = ThreadPoolExecutor(number, "core", initializer=_take_one)
        self._together = ThreadPoolExecutor(1, "cores")

    def take(self) -> None:
        """Leave the cores to these threads: the calling one, and all of the process that begin to compute
        later, have one.

        Each thread that computes gets OpenMP threads of its own, which stay for as long as it does; the
        square root of a few numbers is enough. While there are more of them than cores, libgomp lets all
        sleep at the end of each operation instead of spinning, and a denoiser on two cores is a quarter
        slower; while there are not, they spin beside those who work.
        """
        if self.number is not None:
            self._together.submit(_take, self.number).result()
            _take_one()

    def shares(self, rows: int) -> list[slice]:
        """Even parts of so many rows, one for each core; a single one where too many cores would be idle."""
        number = self.num_shares
        if rows < ENOUGH * number * ceil(rows / number):
            return [slice(0, rows)]
        ends = [rows * place // number for place in range(number + 1)]
        return [slice(start, end) for start, end in zip(ends, ends[1:], strict=False)]

    def apart(self, work: Callable[[slice], torch.Tensor], rows: int) -> torch.Tensor:
        """What `work` gives of N rows, N x ..., put together from that of their shares."""
        shares = self.shares(rows)
        if len(shares) == 1:
            return self.together(partial(work, shares[0]))
        return torch.cat(list(self._apart.map(partial(_inferred, work), shares)))

    def together(self, work: Callable[[], T]) -> T:
        """What `work` gives, computed with all cores."""
        return work() if self.number is None else self._together.submit(_inferred, work).result()

    def close(self) -> None:
        """End the threads."""
        self._apart.shutdown()
        self._together.shutdown()


def _take(number: int) -> None:
    torch.get_num_threads()  # a thread that has not computed yet would take the process's number when it does
    torch.set_num_threads(number)  # this thread's and the process's


def _take_one() -> None:
    _take(1)


def _inferred(work: Callable[..., T], *arguments: slice) -> T:
    """In inference mode, which a thread does not have from another one."""
    with torch.inference_mode():
        return work(*arguments)
