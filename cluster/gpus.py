"""A process's share of a GPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

OUTSIDE_BYTES = 700 * 2**20
"""GPU memory of a process that PyTorch's allocator does not count: CUDA's context, and the libraries' own."""


def memory_fraction(share: float, total_bytes: int) -> float:
    """Return the fraction of a GPU's memory that PyTorch may allocate in a process with a share of the GPU.

    Raises:
        ValueError: the share does not even hold what a process takes outside of PyTorch.
    """
    fraction = share - OUTSIDE_BYTES / total_bytes
    if fraction <= 0:
        raise ValueError(
            f"gpu_share: {share:g} of a GPU of {total_bytes / 2**30:.0f} GiB is less than the "
            f"{OUTSIDE_BYTES / 2**30:.1f} GiB that each process takes; raise it"
        )
    return fraction


def take_share(share: float, device: "torch.device | None" = None) -> None:
    """Limit this process to its share of the memory of a GPU (None: the current device).

    Ray does not enforce shares: a process that exceeds its own must fail, not its neighbour.
    """
    import torch

    if share < 1:
        _, total = torch.cuda.mem_get_info(device)
        torch.cuda.set_per_process_memory_fraction(memory_fraction(share, total), device)


@contextmanager
def leaving_free(part: float, share: float, device: "torch.device") -> Iterator[None]:
    """Lower the limit of this process's GPU memory in the block, by a part of it.

    Args:
        share: what `take_share` was called with.
    """
    import torch

    _, total = torch.cuda.mem_get_info(device)
    limit = memory_fraction(share, total)
    torch.cuda.set_per_process_memory_fraction((1 - part) * limit, device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(limit if share < 1 else 1.0, device)
