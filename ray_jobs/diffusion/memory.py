"""What to do when a device runs out of memory, or is broken."""

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch

R = TypeVar("R")


class Items(Protocol):
    """Anything of which slices can be taken: a list, a range, an array, a tensor."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice, /) -> Any: ...


class Chunks:
    """Work on as many items at a time as the device's memory allows.

    Attributes:
        most: items at a time since memory was last too small; None: all that are given.
    """

    def __init__(self) -> None:
        self.most: int | None = None

    def run(self, items: Items, work: Callable[[Any], R]) -> list[R]:
        """Return what `work` returns for consecutive parts of the items, each as large as possible.

        Where memory is too small, it is freed and `work` called again with half of the items.

        Raises:
            torch.OutOfMemoryError: memory is too small for a single item.
        """
        done: list[R] = []
        at = 0
        while at < len(items):
            part = items[at : at + (self.most or len(items))]
            try:
                done.append(work(part))
                at += len(part)
                continue
            except torch.OutOfMemoryError:
                if len(part) == 1:
                    raise
            # Outside of the handler: the error holds on to the activations.
            torch.cuda.empty_cache()
            self.most = len(part) // 2
        return done


def device_broken(error: BaseException) -> bool:
    """Return whether an error leaves the process's CUDA context unusable, as an illegal access does."""
    return isinstance(error, torch.AcceleratorError) or "CUDA error" in str(error)
