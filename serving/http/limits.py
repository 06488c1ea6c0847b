"""How much a client may ask for: a rate and a number of requests at the same time. Pure: the clock is given.

Both are counted where they are made, so with several copies of the HTTP application each counts its own.
They are not locked: one thread, that of the event loop, uses them.
"""

import time
from collections import Counter, OrderedDict
from collections.abc import Callable

SECOND = 1_000_000_000
MINUTE = 60 * SECOND


class RateLimit:
    """A token bucket a client: it holds a minute's requests, and fills evenly.

    So in any t seconds a client gets at most `burst + t * burst / 60` requests, where `burst` is what it
    may ask for in a minute. What is kept of a client is one number, the time at which its bucket is full
    again (the generic cell rate algorithm, ITU-T I.371, in its form as a virtual schedule). Times are whole
    nanoseconds, so that nothing is lost to rounding.

    Args:
        clock: nanoseconds that never go back.
        max_clients: remembered at a time; the one seen longest ago is forgotten first, and with it what it
            has used. Clients whose buckets are full need no memory, so this matters only when so many ask
            within a minute.
    """

    def __init__(self, clock: Callable[[], int] = time.monotonic_ns, *, max_clients: int = 100_000) -> None:
        self._clock, self._max_clients = clock, max_clients
        self._full_at: OrderedDict[str, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self._full_at)

    def take(self, client: str, requests_per_minute: int) -> int:
        """Take a token. Returns 0, or the whole seconds after which one will be there; then none is taken."""
        now = self._clock()
        interval = -(-MINUTE // requests_per_minute)  # rounded up: never more than the rate
        full_at = max(self._full_at.get(client, now), now) + interval
        too_early = full_at - now - requests_per_minute * interval
        if too_early > 0:
            return -(-too_early // SECOND)
        self._full_at[client] = full_at
        self._full_at.move_to_end(client)
        self._forget(now)
        return 0

    def _forget(self, now: int) -> None:
        """Drop clients of full buckets, and above `max_clients` those seen longest ago. A look at two of them
        a request suffices, because each request adds one at most."""
        for _ in range(2):
            oldest, full_at = next(iter(self._full_at.items()))
            if full_at <= now or len(self._full_at) > self._max_clients:
                del self._full_at[oldest]


class ConcurrencyLimit:
    """Requests of a client that are being answered; clients without any take no memory."""

    def __init__(self) -> None:
        self._open: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._open)

    def is_full(self, client: str, concurrent_requests: int) -> bool:
        """Whether the client has so many open requests that it may begin no other."""
        return self._open[client] >= concurrent_requests

    def enter(self, client: str) -> None:
        """A request begins; each is followed by one `leave`."""
        self._open[client] += 1

    def leave(self, client: str) -> None:
        """A request has ended."""
        assert self._open[client] > 0, "a request ended twice"
        self._open[client] -= 1
        if not self._open[client]:
            del self._open[client]
