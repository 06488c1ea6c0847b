"""Group pictures into batches of one shape, and batches into shares of actors. Pure functions."""

from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from typing import TypeVar

Shape = tuple[int, int]  # height and width of a picture in pixels
Item = TypeVar("Item")


def dealt(shapes: Sequence[Shape], count: int, batch_size: int) -> list[list[int]]:
    """Divide the numbers of N pictures into at most `count` shares of whole batches.

    A batch holds up to `batch_size` pictures of one shape, in order. An actor reconstructs the batches of its
    share by cutting each run of one shape from its start (`sampling.batches_of`). A picture is therefore in
    the same batch for any number of actors; in a batch of another size it would be rounded differently.
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
    """Merge the parts of all shares, ordered by picture number."""
    found = {
        number: item
        for share, part in zip(shares, parts, strict=True)
        for number, item in zip(share, part, strict=True)
    }
    return [found[number] for number in sorted(found)]
