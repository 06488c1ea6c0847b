"""Work on runs of a dataset's rows: in this process for a small dataset, by Ray tasks for a large one."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    import ray

T = TypeVar("T")
R = TypeVar("R")
S = TypeVar("S")
D = TypeVar("D")
F = TypeVar("F")


class Workers(Protocol):
    """Functions of items, applied to each item, or to what all items deal to a partition.

    Results are in the order of the items, or of the partitions, however the work is done.
    """

    def each(self, function: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
        """Yield the result for each item."""

    def shuffle(
        self,
        deal: Callable[[T], tuple[S, Sequence[D]]],
        items: Sequence[T],
        gather: Callable[[Sequence[D]], R],
        num_partitions: int,
    ) -> tuple[list[S], Iterator[R]]:
        """Return what `deal` returns of each item, and the results of `gather` for each partition.

        Args:
            deal: function that returns something of an item, and one block per partition.
            gather: function of a partition's blocks, in the order of the items.
        """

    def fold(
        self,
        deal: Callable[[T], tuple[S, Sequence[D]]],
        items: Sequence[T],
        gather: Callable[[Sequence[D]], R],
        num_partitions: int,
        fold: Callable[[Iterator[R]], F],
    ) -> tuple[list[S], F]:
        """Return as `shuffle`, with what `fold` makes of the results, which stay where they are."""


class InProcess:
    """Work in this process, one item after the other."""

    def each(self, function: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
        return map(function, items)

    def shuffle(
        self,
        deal: Callable[[T], tuple[S, Sequence[D]]],
        items: Sequence[T],
        gather: Callable[[Sequence[D]], R],
        num_partitions: int,
    ) -> tuple[list[S], Iterator[R]]:
        own, blocks = [], []
        for item in items:
            found, dealt = deal(item)
            assert len(dealt) == num_partitions
            own.append(found)
            blocks.append(dealt)
        return own, (gather([dealt[n] for dealt in blocks]) for n in range(num_partitions))

    def fold(
        self,
        deal: Callable[[T], tuple[S, Sequence[D]]],
        items: Sequence[T],
        gather: Callable[[Sequence[D]], R],
        num_partitions: int,
        fold: Callable[[Iterator[R]], F],
    ) -> tuple[list[S], F]:
        own, results = self.shuffle(deal, items, gather, num_partitions)
        return own, fold(results)


class RayTasks:
    """Work in Ray tasks of one core each; a task that dies with its node is run again.

    Args:
        at_once: tasks that are submitted ahead of the one whose result is awaited. It bounds the results
            that wait in memory.
    """

    def __init__(self, at_once: int = 64) -> None:
        self.at_once = at_once

    def each(self, function: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
        import ray

        task, shared = ray.remote(_apply), ray.put(function)
        return self._results(lambda item: task.remote(shared, item), items)

    def shuffle(
        self,
        deal: Callable[[T], tuple[S, Sequence[D]]],
        items: Sequence[T],
        gather: Callable[[Sequence[D]], R],
        num_partitions: int,
    ) -> tuple[list[S], Iterator[R]]:
        found, partitions = self._dealt(deal, items, num_partitions)
        return found, self.gathered(gather, partitions)

    def fold(
        self,
        deal: Callable[[T], tuple[S, Sequence[D]]],
        items: Sequence[T],
        gather: Callable[[Sequence[D]], R],
        num_partitions: int,
        fold: Callable[[Iterator[R]], F],
    ) -> tuple[list[S], F]:
        import ray

        found, partitions = self._dealt(deal, items, num_partitions)
        folded: F = ray.get(ray.remote(_fold).remote(self, gather, partitions, fold))
        return found, folded

    def _dealt(
        self, deal: Callable[[T], tuple[S, Sequence[D]]], items: Sequence[T], num_partitions: int
    ) -> "tuple[list[S], list[list[ray.ObjectRef[D]]]]":
        """Deal all items; return what `deal` returns of each, and references to each partition's blocks."""
        import ray

        dealer = ray.remote(num_returns=1 + num_partitions)(_deal)
        shared, own, blocks = ray.put(deal), [], []
        for item in items:
            first, *dealt = dealer.remote(shared, item)
            own.append(first)
            blocks.append(dealt)
        found: list[S] = ray.get(own)
        return found, [[dealt[n] for dealt in blocks] for n in range(num_partitions)]

    def gathered(
        self, gather: Callable[[Sequence[D]], R], partitions: "Sequence[Sequence[ray.ObjectRef[D]]]"
    ) -> Iterator[R]:
        """Yield the results of `gather` for each partition's blocks."""
        import ray

        gatherer, how = ray.remote(_gather), ray.put(gather)
        return self._results(lambda refs: gatherer.remote(how, *refs), partitions)

    def _results(self, submit: "Callable[[T], ray.ObjectRef[R]]", items: Sequence[T]) -> Iterator[R]:
        import ray

        waiting = deque["ray.ObjectRef[R]"]()
        for item in items:
            if len(waiting) >= self.at_once:
                yield ray.get(waiting.popleft())
            waiting.append(submit(item))
        while waiting:
            yield ray.get(waiting.popleft())


def _apply(function: Callable[[T], R], item: T) -> R:
    return function(item)


def _deal(deal: Callable[[T], tuple[S, Sequence[D]]], item: T) -> tuple[object, ...]:
    found, blocks = deal(item)
    return found, *blocks


def _fold(
    workers: RayTasks,
    gather: Callable[[Sequence[D]], R],
    partitions: "Sequence[Sequence[ray.ObjectRef[D]]]",
    fold: Callable[[Iterator[R]], F],
) -> F:
    return fold(workers.gathered(gather, partitions))


def _gather(gather: Callable[[Sequence[D]], R], *blocks: D) -> R:
    return gather(blocks)
