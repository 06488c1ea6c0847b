"""The queue between trials and the workers that train them together: who waits for what, and who is told."""

import asyncio
from collections.abc import Awaitable
from dataclasses import dataclass, field
from typing import Any

import pytest

from ray_jobs.training import pack_queue
from ray_jobs.training.pack_queue import PackQueue


@dataclass
class Settings:
    name: str
    ladder: list[int] = field(default_factory=lambda: [2, 4])


def run(walk: Awaitable[None]) -> None:
    async def bounded() -> None:
        await asyncio.wait_for(walk, 10)

    asyncio.run(bounded())


async def joined(queue: PackQueue, *names: str) -> None:
    for name in names:
        await queue.join(name, Settings(name))


async def begun(waiting: Awaitable[Any]) -> "asyncio.Future[Any]":
    """A call that has begun to wait."""
    task = asyncio.ensure_future(waiting)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert not task.done()
    return task


def names(taken: list[Settings] | None) -> list[str]:
    assert taken is not None
    return [each.name for each in taken]


def test_workers_take_as_many_as_fit_and_then_all_that_are_left() -> None:
    async def walk() -> None:
        queue = PackQueue(2)
        await queue.begin(3)
        await joined(queue, "a")
        taking = await begun(queue.take("group"))
        await joined(queue, "b")
        assert names(await taking) == queue.names() == ["a", "b"]
        await queue.rung_saved("a", 4)
        await joined(queue, "c")
        taking = await begun(queue.take("group"))  # b is not done yet
        await queue.rung_saved("b", 4)
        assert names(await taking) == ["c"]

    run(walk())


def test_a_trial_that_ends_without_joining_is_not_waited_for() -> None:
    async def walk() -> None:
        queue = PackQueue(2)
        await queue.begin(2)
        await joined(queue, "a")
        taking = await begun(queue.take("group"))
        await queue.leave("b")
        assert names(await taking) == ["a"]

    run(walk())


def test_another_worker_group_goes_on_with_what_the_one_before_had_taken() -> None:
    async def walk() -> None:
        queue = PackQueue(2)
        await queue.begin(2)
        await joined(queue, "a", "b")
        await queue.take("first")
        await queue.rung_saved("a", 4)
        in_vain = await begun(queue.take("first"))  # of workers that die while they wait
        assert names(await queue.take("second")) == ["b"]
        assert await in_vain is None
        await queue.rung_saved("b", 4)
        taking = await begun(queue.take("second"))
        await queue.begin(1)
        await joined(queue, "c")
        assert names(await taking) == ["c"]

    run(walk())


def test_news_come_of_a_rung_of_a_divergence_and_of_a_failure() -> None:
    async def walk() -> None:
        queue = PackQueue(3)
        await queue.begin(3)
        await joined(queue, "a", "b", "c")
        await queue.take("group")
        waiting = [await begun(queue.news(name, 0)) for name in ("a", "b", "c")]
        await queue.rung_saved("a", 2)
        assert await waiting[0] == 2 and await queue.news("a", 0) == 2
        await queue.diverged("b")
        assert await waiting[1] == 0 and queue.names() == ["a", "c"]
        await queue.fail("no GPU is left")
        with pytest.raises(RuntimeError, match="no GPU is left"):
            await waiting[2]
        with pytest.raises(RuntimeError, match="no GPU is left"):
            await queue.news("a", 2)
        await joined(queue, "a")  # Tune starts it again
        assert await queue.wanted()

    run(walk())


def test_trials_that_wait_do_not_fail_with_those_in_training() -> None:
    async def walk() -> None:
        queue = PackQueue(1)
        await queue.begin(2)
        await joined(queue, "a", "b")
        await queue.take("first")
        await queue.fail("no GPU is left")
        with pytest.raises(RuntimeError, match="no GPU is left"):
            await queue.news("a", 0)
        await queue.leave("a")
        assert await queue.wanted() and names(await queue.take("second")) == ["b"]

    run(walk())


def test_fewer_trials_than_announced_are_taken_once_that_is_known() -> None:
    async def walk() -> None:
        queue = PackQueue(4)
        await queue.begin(4)
        await joined(queue, "a", "b")
        taking = await begun(queue.take("group"))
        await queue.expect(2)
        assert names(await taking) == ["a", "b"]

    run(walk())


def test_workers_are_wanted_for_what_dead_ones_had_taken() -> None:
    async def walk() -> None:
        queue = PackQueue(1)
        await queue.begin(1)
        await joined(queue, "a")
        await queue.take("first")
        assert await queue.wanted() and names(await queue.take("second")) == ["a"]

    run(walk())


def test_workers_that_are_to_start_at_once_are_wanted_before_the_first_trial_and_once() -> None:
    async def walk() -> None:
        queue = PackQueue(2, at_once=True)
        assert await queue.wanted()
        await queue.fail("no GPU is left")  # nothing waits that could be told
        again = await begun(queue.wanted())
        await queue.begin(1)
        await joined(queue, "a")
        assert await again

    run(walk())


def test_time_is_shared_by_those_in_training_and_begins_anew_with_each_round(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [100.0]
    monkeypatch.setattr(pack_queue.time, "monotonic", lambda: now[0])

    async def walk() -> None:
        queue = PackQueue(2)
        await queue.begin(2)
        await joined(queue, "a", "b")
        now[0] += 10  # workers start
        await queue.take("group")
        now[0] += 20
        await queue.rung_saved("a", 4)
        now[0] += 5
        assert (queue.seconds("a"), queue.seconds("b")) == (15, 20)
        await queue.rung_saved("b", 4)
        now[0] += 6  # while its last rung is measured, and that of the other, workers are held
        assert (queue.seconds("a"), queue.seconds("b")) == (18, 23)
        await queue.leave("a")
        now[0] += 1
        assert (queue.seconds("a"), queue.seconds("b")) == (18, 24)
        await queue.begin(1)
        await queue.join("b", Settings("b", [2, 4, 6]))
        now[0] += 3  # while scores are measured, workers are held
        await queue.take("group")
        now[0] += 1
        assert queue.seconds("b") == 4

    run(walk())


def test_a_trial_that_is_stopped_leaves_and_its_place_is_free() -> None:
    async def walk() -> None:
        queue = PackQueue(1)
        await queue.begin(2)
        await joined(queue, "a")
        await queue.take("group")
        await queue.leave("a")
        assert queue.names() == []
        await joined(queue, "b")
        assert names(await queue.take("group")) == ["b"]

    run(walk())


def test_a_closed_queue_lets_workers_end() -> None:
    async def walk() -> None:
        queue = PackQueue(1)
        await queue.begin(1)
        taking, wanted = await begun(queue.take("group")), await begun(queue.wanted())
        await queue.close()
        assert await taking is None and not await wanted

    run(walk())
