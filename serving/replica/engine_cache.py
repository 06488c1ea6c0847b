"""Cache of a replica's engines by name, loaded while others keep running."""

import asyncio
import threading
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Generic, TypeVar

Engine = TypeVar("Engine")

# diffusers and transformers create modules without weights while loading, by a switch of the whole process:
# with two loads at once, one gets no weights, and later ones may not either. Every load in a replica takes
# this lock.
LOADING = threading.Lock()


class NoRoom(RuntimeError):
    """The device's memory is too small for another engine."""


class EngineCache(Generic[Engine]):
    """Least-recently-used cache of engines by name. Call all methods from the same event loop.

    Idle engines make room before another one is loaded, so that there are more than `max_kept` only while
    these are in use: such engines are never closed.

    Args:
        load: function that loads an engine, one at a time; runs in a thread, so that others keep running.
            Before it takes memory, it calls its second argument, which closes idle engines. Where it raises
            NoRoom, all idle engines are closed and it is called once more.
        close: function that stops an unused engine; runs in a thread too.
        max_kept: maximum engines in memory.

    Attributes:
        num_closed: engines closed since the start.
    """

    def __init__(
        self,
        load: Callable[[str, Callable[[], None]], Engine],
        close: Callable[[Engine], None],
        *,
        max_kept: int,
    ) -> None:
        self._load, self._close, self.max_kept = load, close, max_kept
        self._kept: OrderedDict[str, Engine] = OrderedDict()
        self._loading: dict[str, asyncio.Task[Engine]] = {}
        self._users: Counter[str] = Counter()
        self._turn = asyncio.Lock()  # waits in the event loop, without blocking a pool thread
        self._closing = asyncio.Lock()
        self.num_closed = 0

    @property
    def engines(self) -> dict[str, Engine]:
        """The engines in memory, least recently used first."""
        return dict(self._kept)

    @property
    def idle(self) -> list[str]:
        """Names of the engines in memory that nobody uses, least recently used first."""
        return [name for name in self._kept if not self._users[name]]

    def touch(self, name: str) -> None:
        """Count an engine in memory as used now."""
        self._kept.move_to_end(name)

    @asynccontextmanager
    async def use(self, name: str) -> AsyncIterator[Engine]:
        """Provide the engine of this name; it stays in memory while it is in use.

        Raises:
            Exception: any exception of `load`; the next use tries again.
        """
        self._users[name] += 1
        try:
            engine = self._kept.get(name)
            if engine is None:
                engine = await self._loaded(name)
            self._kept.move_to_end(name)
            yield engine
        finally:
            self._users[name] -= 1
            self._users += Counter()  # removes zero counts
            await self.close_idle(self.max_kept)

    async def close_idle(self, most: int = 0) -> None:
        """Close idle engines, the least recently used first, until at most `most` engines are in memory.

        Return only when those are closed that another caller has begun to close.
        """
        if len(self._kept) <= most:
            return
        async with self._closing:
            while len(self._kept) > most and self.idle:
                self.num_closed += 1
                await asyncio.shield(asyncio.to_thread(self._close, self._kept.pop(self.idle[0])))

    async def _loaded(self, name: str) -> Engine:
        """Load an engine once for all its callers; a cancelled caller does not cancel it for the others."""
        if name not in self._loading:
            self._loading[name] = asyncio.create_task(self._load_and_keep(name))
        return await asyncio.shield(self._loading[name])

    async def _load_and_keep(self, name: str) -> Engine:
        try:
            async with self._turn:
                if not self._users[name]:  # all callers left while another engine was loading
                    raise asyncio.CancelledError
                engine = self._kept[name] = await self._load_with_room(name)
        finally:
            del self._loading[name]
        if not self._users[name]:
            await self.close_idle(self.max_kept)
        return engine

    async def _load_with_room(self, name: str) -> Engine:
        try:
            return await asyncio.to_thread(self._load_alone, name, asyncio.get_running_loop())
        except NoRoom:
            if not self.idle:
                raise
        await self.close_idle()
        return await asyncio.to_thread(self._load_alone, name, asyncio.get_running_loop())

    def _load_alone(self, name: str, loop: asyncio.AbstractEventLoop) -> Engine:
        def make_room() -> None:
            asyncio.run_coroutine_threadsafe(self.close_idle(self.max_kept - 1), loop).result()

        with LOADING:
            return self._load(name, make_room)
