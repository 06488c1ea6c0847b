"""Tasks that run beside requests."""

import asyncio
from collections.abc import Coroutine


class Background:
    """Tasks that nobody waits for. Use it from one event loop only.

    Attributes:
        tasks: those that have not ended.
    """

    def __init__(self) -> None:
        self.tasks: set[asyncio.Task[None]] = set()

    def start(self, work: Coroutine[object, None, None]) -> None:
        """Start a task, and keep it until it ends."""
        task = asyncio.create_task(work)
        self.tasks.add(task)  # the event loop itself holds only a weak reference
        task.add_done_callback(self.tasks.discard)
