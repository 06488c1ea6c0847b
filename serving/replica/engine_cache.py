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


class EngineCache(Generic[Engine]):
    """Least-recently-used cache of engines by name. Call all methods from the same event loop.

    Args:
        load: function that loads an engine, one at a time; runs in a thread, so that others keep running.
        close: function that stops an unused engine; runs in a thread too.
        max_kept: maximum engines in memory; exceeded while more are in use, as those are never closed.
    """

    def __init__(
        self, load: Callable[[str], Engine], close: Callable[[Engine], None], *, max_kept: int
    ) -> None:
        self._load, self._close, self.max_kept = load, close, max_kept
        self._kept: OrderedDict[str, Engine] = OrderedDict()
        self._loading: dict[str, asyncio.Task[Engine]] = {}
        self._users: Counter[str] = Counter()
        self._turn = asyncio.Lock()  # waits in the event loop, without blocking a pool thread

    @property
    def engines(self) -> dict[str, Engine]:
        """The engines in memory, least recently used first."""
        return dict(self._kept)

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
            await self._trim()

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
                engine = self._kept[name] = await asyncio.to_thread(self._load_alone, name)
        finally:
            del self._loading[name]
        if not self._users[name]:
            await self._trim()
        return engine

    def _load_alone(self, name: str) -> Engine:
        with LOADING:
            return self._load(name)

    async def _trim(self) -> None:
        while len(self._kept) > self.max_kept:
            idle = next((name for name in self._kept if not self._users[name]), None)
            if idle is None:
                return
            await asyncio.shield(asyncio.to_thread(self._close, self._kept.pop(idle)))
