"""The models of a replica: engines by name, loaded beside running ones, a few kept."""

import asyncio
import threading
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Generic, TypeVar

Engine = TypeVar("Engine")

# diffusers and transformers make modules without weights while they load, by a switch of the whole process:
# of two loads at once one gets no weights, nor may later ones. All that a replica loads takes this.
LOADING = threading.Lock()


class EngineCache(Generic[Engine]):
    """Gives out engines by name. All its methods belong to one event loop.

    Args:
        load: makes an engine, one at a time; runs in a thread, so that the ones that are there go on drawing.
        close: ends an engine that nobody uses; runs in a thread too.
        max_kept: engines in memory. The least recently used goes, but never one in use: while all are, there
            are more.
    """

    def __init__(
        self, load: Callable[[str], Engine], close: Callable[[Engine], None], *, max_kept: int
    ) -> None:
        self._load, self._close, self.max_kept = load, close, max_kept
        self._kept: OrderedDict[str, Engine] = OrderedDict()
        self._loading: dict[str, asyncio.Task[Engine]] = {}
        self._users: Counter[str] = Counter()
        self._turn = asyncio.Lock()  # waits in the event loop, not in a thread that others need

    @property
    def engines(self) -> dict[str, Engine]:
        """Those in memory, the least recently used first."""
        return dict(self._kept)

    @asynccontextmanager
    async def use(self, name: str) -> AsyncIterator[Engine]:
        """The engine of a name, which stays for as long as it is used.

        Raises:
            Exception: what `load` raised; the next use tries again.
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
            self._users += Counter()  # forgets the zeros
            await self._trim()

    async def _loaded(self, name: str) -> Engine:
        """Loads an engine once, however many ask; one that goes away does not end it for the others."""
        if name not in self._loading:
            self._loading[name] = asyncio.create_task(self._load_and_keep(name))
        return await asyncio.shield(self._loading[name])

    async def _load_and_keep(self, name: str) -> Engine:
        try:
            async with self._turn:
                if not self._users[name]:  # all have gone while others were loaded
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
