"""The engine beside an event loop: answers, cancellation, errors, an orderly end."""

import asyncio
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ray_jobs.weights.loading import load_pipeline
from serving.engine.engine import Engine
from serving.engine.thread import EngineStopped, EngineThread
from serving.request import Request


@pytest.fixture
def thread(tiny_model: Path) -> Iterator[EngineThread]:
    thread = EngineThread(Engine(load_pipeline(str(tiny_model)), max_rows=4))
    thread.start()
    yield thread
    thread.stop()


def test_an_event_loop_awaits_pictures_while_it_stays_free(thread: EngineThread) -> None:
    async def ask() -> tuple[list[torch.Tensor], int]:
        requests = [thread.submit(Request("a", seed, 6, 1.0)) for seed in range(6)]
        answers = asyncio.gather(*map(asyncio.wrap_future, requests))
        beats = 0
        while not answers.done():
            beats += 1
            await asyncio.sleep(0.001)
        return [drawing.pixels for drawing in await answers], beats

    pictures, beats = asyncio.run(ask())
    assert beats > 5
    assert len({tuple(picture.flatten().tolist()) for picture in pictures}) == 6


def test_previews_reach_the_event_loop_before_the_picture(thread: EngineThread) -> None:
    async def ask() -> list[int]:
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[int]()
        request = Request("a", 0, 8, 1.0, previews=3)
        future = thread.submit(request, lambda done, _: loop.call_soon_threadsafe(queue.put_nowait, done))
        await asyncio.wrap_future(future)
        return [queue.get_nowait() for _ in range(queue.qsize())]

    assert asyncio.run(ask()) == [2, 4, 6]


def test_stopping_is_not_forgotten_where_it_comes_between_two_looks(tiny_model: Path) -> None:
    """The thread is told to stop while it gets ready to sleep."""
    thread = EngineThread(Engine(load_pipeline(str(tiny_model))))
    stopping = threading.Thread(target=thread.stop, daemon=True)

    class Woken(threading.Event):
        def clear(self) -> None:
            if not stopping.ident:
                stopping.start()
                while not self.is_set():
                    time.sleep(0.001)
            super().clear()

    thread.engine.work = Woken()
    thread.start()
    deadline = time.monotonic() + 30
    while not stopping.ident or stopping.is_alive():
        assert time.monotonic() < deadline, "it waits for ever"
        time.sleep(0.001)


def test_a_cancelled_task_frees_its_row(thread: EngineThread) -> None:
    async def leave() -> None:
        task = asyncio.ensure_future(asyncio.wrap_future(thread.submit(Request("a", 0, 900, 1.0))))
        while not thread.engine.load().running:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.wrap_future(thread.submit(Request("a", 0, 1, 1.0)))

    asyncio.run(leave())
    assert thread.engine.load().calls < 900
    deadline = time.monotonic() + 30
    while thread.engine.load().running and time.monotonic() < deadline:
        time.sleep(0.001)
    assert thread.engine.load().running == 0


def test_an_idle_engine_wakes_up_for_a_request(thread: EngineThread) -> None:
    assert thread.submit(Request("a", 0, 1, 1.0)).result(60)
    deadline = time.monotonic() + 30
    while thread.engine.work.is_set() and time.monotonic() < deadline:  # it looks once more before it sleeps
        time.sleep(0.001)
    calls = thread.engine.load().calls
    assert thread.submit(Request("a", 0, 1, 1.0)).result(60)
    assert thread.engine.load().calls == calls + 1


def test_stopping_answers_every_request(tiny_model: Path) -> None:
    thread = EngineThread(Engine(load_pipeline(str(tiny_model)), max_rows=1))
    thread.start()
    futures = [thread.submit(Request("a", seed, 900, 1.0)) for seed in range(3)]
    thread.stop()
    for future in futures:
        with pytest.raises(EngineStopped):
            future.result(0)
    with pytest.raises(EngineStopped):
        thread.submit(Request("a", 0, 1, 1.0))
