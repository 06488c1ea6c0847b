"""What to do when a device runs out of memory, or is broken."""

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch

R = TypeVar("R")

PIXELS_AT_ONCE = 4 << 20
"""Pixels of the pictures that an autoencoder encodes or decodes at once: four of 1024 x 1024.

Stable Diffusion's decoder takes 3 GiB for each of these in float32, half of that in bf16: together half of
the memory of a GPU of 24 GiB.
"""


def pictures_at_once(height: int, width: int) -> int:
    """Return how many pictures of a size, in pixels, an autoencoder encodes or decodes at once."""
    return max(1, PIXELS_AT_ONCE // (height * width))


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

    def run(self, items: Items, work: Callable[[Any], R], limit: int | None = None) -> list[R]:
        """Return what `work` returns for consecutive parts of the items, each as large as possible.

        Where memory is too small, it is freed and `work` called again with half of the items.

        Args:
            limit: maximum items of a part; None: all.

        Raises:
            torch.OutOfMemoryError: memory is too small for a single item.
        """
        done: list[R] = []
        at = 0
        while at < len(items):
            part = items[at : at + min(self.most or len(items), limit or len(items))]
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
