"""A replica's engines: loaded once, beside running ones, the least recently used let go."""

import asyncio
import threading

import pytest

from serving.replica.engine_cache import EngineCache


class Shelf:
    """Counts what is loaded and closed; loading a name in `slow` waits until it is let go."""

    def __init__(self) -> None:
        self.loaded: list[str] = []
        self.closed: list[str] = []
        self.slow: dict[str, threading.Event] = {}

    def load(self, name: str) -> str:
        self.loaded.append(name)
        if name == "broken":
            raise ValueError("broken weights")
        if name in self.slow:
            assert self.slow[name].wait(10)
        return name.upper()


@pytest.fixture
def shelf() -> Shelf:
    return Shelf()


def engine_cache(shelf: Shelf, max_kept: int = 2) -> EngineCache[str]:
    return EngineCache(shelf.load, shelf.closed.append, max_kept=max_kept)


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
