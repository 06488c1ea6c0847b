"""Where the time goes between a worker's beginning and the end of its first step."""

import time


class StartUp:
    """A stopwatch that is told the end of each phase.

    Attributes:
        began: when the worker's function was called; seconds since 1970.
        seconds: of each phase, in their order.
    """

    def __init__(self) -> None:
        self.began, self.last = time.time(), time.monotonic()
        self.seconds: dict[str, float] = {}

    def done(self, phase: str) -> None:
        """A phase has ended, and the next one begins; a phase ends once."""
        if phase not in self.seconds:
            now = time.monotonic()
            self.seconds[phase], self.last = now - self.last, now

    @property
    def record(self) -> dict[str, float]:
        """What a checkpoint keeps of it."""
        return {"began": self.began, **self.seconds}
