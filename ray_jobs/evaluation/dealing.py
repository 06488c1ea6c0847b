"""Pictures as batches of one shape, and batches as shares of actors. Pure."""

from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from typing import TypeVar

Shape = tuple[int, int]  # of a picture: height, width in pixels
Item = TypeVar("Item")


def dealt(shapes: Sequence[Shape], count: int, batch_size: int) -> list[list[int]]:
    """The numbers of N pictures as at most `count` shares, each of whole batches.

    A batch has up to `batch_size` pictures of one shape, in their order. An actor finds the batches of its
    share again by cutting runs of one shape from their beginning (`sampling.batches_of`). So a picture is
    always in the same batch, however many actors there are: in a batch of another size it would be rounded
    otherwise.
    """
    of_shape: dict[Shape, list[int]] = defaultdict(list)
    for number, shape in enumerate(shapes):
        of_shape[shape].append(number)
    batches = [
        numbers[first : first + batch_size]
        for _, numbers in sorted(of_shape.items())
        for first in range(0, len(numbers), batch_size)
    ]
    count = min(count, len(batches))
    ends = [len(batches) * number // count for number in range(count + 1)] if count else []
    return [sum(batches[first:last], []) for first, last in pairwise(ends)]


def in_order(shares: Sequence[Sequence[int]], parts: Sequence[Sequence[Item]]) -> list[Item]:
    """The items of all shares' parts in the order of their numbers."""
    found = {
        number: item
        for share, part in zip(shares, parts, strict=True)
        for number, item in zip(share, part, strict=True)
    }
    return [found[number] for number in sorted(found)]
