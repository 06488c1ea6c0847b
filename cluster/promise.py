"""A value that the driver is still working on, for actors and tasks that will need it."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    from ray import ObjectRef
    from ray.actor import ActorHandle

T = TypeVar("T")


class Promise(Generic[T]):
    """Handle of the value; cheap to send to other processes.

    Args:
        keeper: handle of a `_Keeper`, which other processes ask.
        work: what the driver itself waits for; None in other processes.
    """

    def __init__(self, keeper: "ActorHandle", work: "Future[T] | None" = None) -> None:
        self.keeper, self._work = keeper, work

    def __reduce__(self) -> tuple[Any, ...]:
        return Promise, (self.keeper,)

    def wait(self) -> T:
        """Wait for the value and return it; in another process, a copy, which is fetched once.

        Raises:
            Exception: what the work raised; in another process a RuntimeError with its message.
        """
        import ray

        if self._work is None:
            [value] = ray.get(self.keeper.value.remote())
            self._work = Future()
            self._work.set_result(ray.get(value))
        return self._work.result()

    @property
    def has_failed(self) -> bool:
        """Return whether the driver's work has ended with an error."""
        return self._work is not None and self._work.done() and self._work.exception() is not None


class _Keeper:
    """Actor that holds a reference to the value; it never reads it, which could take imports of seconds."""

    def __init__(self) -> None:
        self.known = asyncio.Event()
        self.references: list[ObjectRef[Any]] = []
        self.error = ""

    async def keep(self, references: "list[ObjectRef[Any]]", error: str = "") -> None:
        """Let those who wait have the reference, or an error."""
        self.references, self.error = references, error
        self.known.set()

    async def value(self) -> "list[ObjectRef[Any]]":
        """Wait for the reference and return it, in a list.

        Raises:
            RuntimeError: the work has failed.
        """
        await self.known.wait()
        if self.error:
            raise RuntimeError(self.error)
        return self.references


@contextmanager
def promised(work: Callable[[], T]) -> Iterator[Promise[T]]:
    """Do the work in a thread of this process, and yield a promise of what it returns.

    The promise can be kept for as long as the block runs. What the work raises is raised by `Promise.wait`.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # On the driver's node: another one could be lost, and the value with it.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    keeper: Any = ray.remote(num_cpus=0, scheduling_strategy=here)(_Keeper).remote()
    done: Future[T] = Future()

    def keep() -> None:
        try:
            value = work()
            ray.get(keeper.keep.remote([ray.put(value)]))
        except Exception as error:
            done.set_exception(error)
            keeper.keep.remote([], f"{type(error).__name__}: {error}")
        else:
            done.set_result(value)

    # Not waited for where the block ends early: its calls to actors fail as these end.
    threading.Thread(target=keep, daemon=True).start()
    try:
        yield Promise(keeper, done)
    finally:
        ray.kill(keeper)
