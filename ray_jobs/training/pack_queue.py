"""What passes between the trials of a search and the worker group that trains them together."""

import asyncio
import time
from typing import Any


class PackQueue:
    """Actor in which trials queue for a worker group that trains `size` of them at a time.

    A trial joins with its `LoopSettings`, and waits for news of its rungs. The workers take trials when as
    many wait as they can train together, or all that are still to come; they ask which of these have left
    meanwhile.

    Args:
        size: the most trials that are trained together.
        at_once: a worker group is wanted before the first trial waits for it.
    """

    def __init__(self, size: int, at_once: bool = False) -> None:
        self.size, self.at_once, self.to_come, self.closed = size, at_once, 0, False
        self.group = ""  # the worker group that asked last
        self.waiting: dict[str, Any] = {}
        self.training: dict[str, Any] = {}
        self.trained: set[str] = set()  # those whose last rung is in storage, and being measured
        self.gone: set[str] = set()  # of this round: those that are trained, have left, or never came
        self.saved: dict[str, int] = {}  # step of the last rung that is in storage, by training
        self.ended: set[str] = set()  # trainings that ended before their last rung
        self.failures: dict[str, str] = {}
        self.spent: dict[str, float] = {}  # seconds of workers, by training
        self.counted_at = time.monotonic()
        self.changed = asyncio.Condition()

    def _count(self) -> None:
        """Count the time since the last call for what is in training, in equal shares.

        Without that it counts for those whose last rung is being measured, or else for what comes next.
        """
        names = self.training or self.trained
        if not names:
            return
        now = time.monotonic()
        for name in names:
            self.spent[name] = self.spent.get(name, 0.0) + (now - self.counted_at) / len(names)
        self.counted_at = now

    def seconds(self, name: str) -> float:
        """Return a training's share of the workers' time in this round: seconds."""
        self._count()
        return self.spent.get(name, 0.0)

    async def _tell(self) -> None:
        async with self.changed:
            self.changed.notify_all()

    async def begin(self, trials: int) -> None:
        """Begin a round of so many trials; what is left of an earlier one leaves."""
        self.to_come = trials
        self._count()
        self.spent.clear()
        self.gone.clear()
        self.trained.clear()
        self.waiting.clear()
        self.training.clear()
        await self._tell()

    async def expect(self, trials: int) -> None:
        """Expect no more than so many trials in this round."""
        self.to_come = trials
        await self._tell()

    async def join(self, name: str, settings: Any) -> None:
        """Let a training wait for its place; one that is in training stays there."""
        self.failures.pop(name, None)
        self.ended.discard(name)
        if name not in self.training:
            self.saved.pop(name, None)
            self.gone.discard(name)
            self.waiting[name] = settings
        await self._tell()

    async def leave(self, name: str) -> None:
        """Take a training out, wherever it is: it was stopped, is finished, or has failed."""
        self.waiting.pop(name, None)
        self._end(name)
        self.trained.discard(name)
        await self._tell()

    async def news(self, name: str, step: int) -> int:
        """Wait until a rung after `step` is in storage, and return its step; 0 if the training diverged.

        Raises:
            RuntimeError: the worker group has failed.
        """

        def there() -> bool:
            return self.saved.get(name, 0) > step or name in self.ended or name in self.failures

        async with self.changed:
            await self.changed.wait_for(there)
        if name in self.failures:
            raise RuntimeError(self.failures[name])
        return self.saved.get(name, 0) if self.saved.get(name, 0) > step else 0

    def _is_ready(self) -> bool:
        coming = self.to_come - len(self.gone)
        return not self.training and 0 < min(self.size, coming) <= len(self.waiting)

    async def wanted(self) -> bool:
        """Wait until a worker group is needed; return False once the queue is closed."""
        async with self.changed:
            await self.changed.wait_for(
                lambda: self.closed or self.at_once or bool(self.waiting or self.training)
            )
        self.at_once = False
        return not self.closed

    async def take(self, group: str) -> list[Any] | None:
        """Wait for trainings and return their settings; None once the queue is closed.

        Args:
            group: identifies the worker group. Another one than before goes on with what that one had taken,
                and what that one still waits for is in vain.
        """
        starts, self.group = group != self.group, group
        await self._tell()

        def may_take() -> bool:
            return self._is_ready() or (starts and bool(self.training))

        async with self.changed:
            await self.changed.wait_for(lambda: self.closed or self.group != group or may_take())
        if self.closed or self.group != group:
            return None
        self._count()
        if not self.training:
            for name in list(self.waiting)[: self.size]:
                self.training[name] = self.waiting.pop(name)
        return list(self.training.values())

    def names(self) -> list[str]:
        """Return the names of the trainings that were taken and have not left."""
        return list(self.training)

    async def rung_saved(self, name: str, step: int) -> None:
        """Record that a rung of a training is in storage; after its last one, the workers are done with it.

        Until then a worker group that takes the place of a dead one takes it again.
        """
        self.saved[name] = max(step, self.saved.get(name, 0))
        if name in self.training and step >= self.training[name].ladder[-1]:
            self._end(name)
            self.trained.add(name)
        await self._tell()

    async def diverged(self, name: str) -> None:
        """Record that a training has ended without its last rung."""
        if name in self.training:
            self.ended.add(name)
            self._end(name)
        await self._tell()

    def _end(self, name: str) -> None:
        self._count()
        self.training.pop(name, None)
        self.gone.add(name)

    async def fail(self, reason: str) -> None:
        """Record that the worker group failed; its trainings, or else those that wait, get the reason."""
        self._count()
        concerned = self.training or self.waiting
        self.failures |= dict.fromkeys(concerned, reason)
        concerned.clear()
        self.group = ""
        await self._tell()

    async def close(self) -> None:
        """Let the worker group end; what it trains has left."""
        self._count()
        self.closed = True
        self.training.clear()
        await self._tell()
