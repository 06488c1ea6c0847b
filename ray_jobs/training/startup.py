"""Timing of a worker's start-up, from its start to the end of its first step."""

import time


class StartUp:
    """Stopwatch for the phases of a worker's start-up.

    Attributes:
        began: time at which the worker's function was called, in seconds since 1970.
        seconds: duration of each phase, in order.
    """

    def __init__(self) -> None:
        self.began, self.last = time.time(), time.monotonic()
        self.seconds: dict[str, float] = {}

    def done(self, phase: str) -> None:
        """End a phase and begin the next one; repeated calls for a phase are ignored."""
        if phase not in self.seconds:
            now = time.monotonic()
            self.seconds[phase], self.last = now - self.last, now

    @property
    def record(self) -> dict[str, float]:
        """The start time and the phases' durations, as a checkpoint stores them."""
        return {"began": self.began, **self.seconds}
