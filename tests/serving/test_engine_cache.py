"""A replica's engines: loaded once, beside running ones, the least recently used let go."""

import asyncio
import threading
from collections.abc import Callable

import pytest

from serving.replica.engine_cache import EngineCache, NoRoom


class Shelf:
    """Counts what is loaded and closed; loading a name in `slow` waits until it is let go.

    There is room for so many engines.
    """

    def __init__(self, room: int = 100) -> None:
        self.loaded: list[str] = []
        self.closed: list[str] = []
        self.slow: dict[str, threading.Event] = {}
        self.held, self.most_held, self.room = 0, 0, room

    def load(self, name: str, make_room: Callable[[], None]) -> str:
        self.loaded.append(name)
        if name == "broken":
            raise ValueError("broken weights")
        make_room()
        if self.held == self.room:
            raise NoRoom("no room")
        self.held += 1
        self.most_held = max(self.held, self.most_held)
        if name in self.slow:
            assert self.slow[name].wait(10)
        return name.upper()

    def close(self, engine: str) -> None:
        self.held -= 1
        self.closed.append(engine)


@pytest.fixture
def shelf() -> Shelf:
    return Shelf()


def engine_cache(shelf: Shelf, max_kept: int = 2) -> EngineCache[str]:
    return EngineCache(shelf.load, shelf.close, max_kept=max_kept)


async def use(engine_cache: EngineCache[str], name: str) -> str:
    async with engine_cache.use(name) as engine:
        return engine


def test_an_engine_is_loaded_once_however_many_ask(shelf: Shelf) -> None:
    async def ask() -> list[str]:
        kept = engine_cache(shelf)
        return await asyncio.gather(*(use(kept, "a") for _ in range(5)))

    assert asyncio.run(ask()) == ["A"] * 5
    assert shelf.loaded == ["a"]


def test_two_engines_are_not_loaded_at_once(shelf: Shelf) -> None:
    async def ask() -> list[str]:
        kept, shelf.slow["a"] = engine_cache(shelf), threading.Event()
        both = asyncio.gather(use(kept, "a"), use(kept, "b"))
        while not shelf.loaded:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        before = list(shelf.loaded)
        shelf.slow["a"].set()
        await both
        return before

    assert asyncio.run(ask()) == ["a"] and shelf.loaded == ["a", "b"]


def test_the_least_recently_used_goes(shelf: Shelf) -> None:
    async def ask() -> list[str]:
        kept = engine_cache(shelf)
        for name in ("a", "b", "a", "c"):
            await use(kept, name)
        return list(kept.engines)

    assert asyncio.run(ask()) == ["a", "c"]
    assert shelf.closed == ["B"]


def test_an_idle_engine_goes_before_another_is_loaded(shelf: Shelf) -> None:
    async def ask() -> None:
        kept = engine_cache(shelf)
        for name in ("a", "b", "c", "a"):
            await use(kept, name)

    asyncio.run(ask())
    assert shelf.closed == ["A", "B"] and shelf.most_held == 2


def test_one_whose_weights_are_refused_costs_no_other_its_place(shelf: Shelf) -> None:
    async def ask() -> list[str]:
        kept = engine_cache(shelf)
        for name in ("a", "b"):
            await use(kept, name)
        with pytest.raises(ValueError, match="broken weights"):
            await use(kept, "broken")
        return list(kept.engines)

    assert asyncio.run(ask()) == ["a", "b"] and not shelf.closed


def test_one_that_is_kept_warm_is_not_the_least_recently_used(shelf: Shelf) -> None:
    async def ask() -> list[str]:
        kept = engine_cache(shelf)
        for name in ("a", "b"):
            await use(kept, name)
        kept.touch("a")
        await use(kept, "c")
        return list(kept.engines)

    assert asyncio.run(ask()) == ["a", "c"]


def test_where_memory_is_too_small_all_idle_engines_go_and_it_is_tried_once_more() -> None:
    shelf = Shelf(room=2)

    async def ask() -> list[str]:
        kept = engine_cache(shelf, max_kept=3)
        await use(kept, "a")
        async with kept.use("b"):
            await use(kept, "c")
        return list(kept.engines)

    assert asyncio.run(ask()) == ["b", "c"]
    assert shelf.loaded == ["a", "b", "c", "c"] and shelf.closed == ["A"]


def test_where_memory_is_too_small_beside_engines_in_use_these_stay() -> None:
    shelf = Shelf(room=1)

    async def ask() -> list[str]:
        kept = engine_cache(shelf, max_kept=3)
        async with kept.use("a"):
            with pytest.raises(NoRoom):
                await use(kept, "b")
        return list(kept.engines)

    assert asyncio.run(ask()) == ["a"]
    assert shelf.loaded == ["a", "b"] and not shelf.closed


def test_whoever_asks_for_room_waits_until_it_is_there(shelf: Shelf) -> None:
    closing, go_on = threading.Event(), threading.Event()

    def close(engine: str) -> None:
        closing.set()
        assert go_on.wait(10)
        shelf.close(engine)

    async def ask() -> bool:
        kept: EngineCache[str] = EngineCache(shelf.load, close, max_kept=3)
        await use(kept, "a")
        async with kept.use("b"):
            first = asyncio.create_task(kept.close_idle())
            while not closing.is_set():
                await asyncio.sleep(0.001)
            second = asyncio.create_task(kept.close_idle())
            await asyncio.sleep(0.01)
            early = second.done()
            go_on.set()
            await asyncio.gather(first, second)
        return early

    assert not asyncio.run(ask())
    assert shelf.closed == ["A"]


def test_one_in_use_never_goes(shelf: Shelf) -> None:
    async def ask() -> list[str]:
        kept = engine_cache(shelf, max_kept=1)
        async with kept.use("a"), kept.use("b"):
            assert set(kept.engines) == {"a", "b"}
            assert not shelf.closed
        return list(kept.engines)

    assert len(asyncio.run(ask())) == 1
    assert len(shelf.closed) == 1


def test_others_are_used_while_one_is_loaded(shelf: Shelf) -> None:
    shelf.slow["slow"] = threading.Event()

    async def ask() -> tuple[str, str]:
        kept = engine_cache(shelf)
        await use(kept, "a")
        loading = asyncio.create_task(use(kept, "slow"))
        while "slow" not in shelf.loaded:
            await asyncio.sleep(0.001)
        other = await use(kept, "a")
        assert not loading.done()
        shelf.slow["slow"].set()
        return other, await loading

    assert asyncio.run(ask()) == ("A", "SLOW")


def test_one_that_stops_waiting_does_not_end_the_loading_for_others(shelf: Shelf) -> None:
    shelf.slow["slow"] = threading.Event()

    async def ask() -> str:
        kept = engine_cache(shelf)
        first, second = (asyncio.create_task(use(kept, "slow")) for _ in range(2))
        while "slow" not in shelf.loaded:
            await asyncio.sleep(0.001)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        shelf.slow["slow"].set()
        return await second

    assert asyncio.run(ask()) == "SLOW"
    assert shelf.loaded == ["slow"]


def test_what_could_not_be_loaded_is_tried_again(shelf: Shelf) -> None:
    async def ask() -> None:
        kept = engine_cache(shelf)
        for _ in range(2):
            with pytest.raises(ValueError, match="broken weights"):
                await use(kept, "broken")
        assert not kept.engines

    asyncio.run(ask())
    assert shelf.loaded == ["broken", "broken"]


def test_loads_that_nobody_waits_for_any_more_are_not_begun_and_leave_no_more_engines(shelf: Shelf) -> None:
    shelf.slow["slow"] = threading.Event()

    async def ask() -> list[str]:
        kept = engine_cache(shelf)
        for name in ("a", "b"):
            await use(kept, name)
        gone = [asyncio.create_task(use(kept, name)) for name in ("slow", "c", "d")]
        while "slow" not in shelf.loaded:
            await asyncio.sleep(0.001)
        for each in gone:
            each.cancel()
        await asyncio.wait(gone)
        shelf.slow["slow"].set()
        while kept._loading or not shelf.closed:  # the first is closed in a thread, after the last load's end
            await asyncio.sleep(0.001)
        return list(kept.engines)

    assert asyncio.run(ask()) == ["b", "slow"]
    assert shelf.loaded == ["a", "b", "slow"] and shelf.closed == ["A"]


def test_one_that_is_used_again_while_another_is_closed_stays(shelf: Shelf) -> None:
    closing, go_on = threading.Event(), threading.Event()

    def close(engine: str) -> None:
        closing.set()
        assert go_on.wait(10)
        shelf.closed.append(engine)

    async def ask() -> list[str]:
        kept: EngineCache[str] = EngineCache(shelf.load, close, max_kept=3)
        for name in ("a", "b", "c"):
            await use(kept, name)
        kept.max_kept = 1
        trimming = asyncio.create_task(use(kept, "c"))
        while not closing.is_set():
            await asyncio.sleep(0.001)
        async with kept.use("b"):
            go_on.set()
            await trimming
            assert shelf.closed == ["A", "C"]
        return list(kept.engines)

    assert asyncio.run(ask()) == ["b"]
