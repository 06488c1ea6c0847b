"""Limits per client: request rate and concurrent requests. Pure: the clock is an argument.

Counts are local, so with several copies of the HTTP application each counts its own. There are no locks: only
the event loop's thread uses them.
"""

import time
from collections import Counter, OrderedDict
from collections.abc import Callable

SECOND = 1_000_000_000
MINUTE = 60 * SECOND


class RateLimit:
    """One token bucket per client: it holds one minute's requests, and fills evenly.

    In any t seconds a client gets at most `burst + t * burst / 60` requests, where `burst` is its limit per
    minute. The state per client is one number, the time at which its bucket is full again (the generic cell
    rate algorithm, ITU-T I.371, in its virtual scheduling form). Times are integer nanoseconds, to avoid
    rounding errors.

    Args:
        clock: monotonic clock in nanoseconds.
        max_clients: maximum clients remembered; the one seen longest ago is forgotten first, including its
            usage. Clients with full buckets take no memory, so this matters only if that many send requests
            within a minute.
    """

    def __init__(self, clock: Callable[[], int] = time.monotonic_ns, *, max_clients: int = 100_000) -> None:
        self._clock, self._max_clients = clock, max_clients
        self._full_at: OrderedDict[str, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self._full_at)

    def take(self, client: str, requests_per_minute: int) -> int:
        """Take a token and return 0; if there is none, return the whole seconds until there is one."""
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
        """Drop clients with full buckets, and above `max_clients` those seen longest ago. Two checks per
        request suffice, because each request adds at most one client."""
        for _ in range(2):
            oldest, full_at = next(iter(self._full_at.items()))
            if full_at <= now or len(self._full_at) > self._max_clients:
                del self._full_at[oldest]


class ConcurrencyLimit:
    """Number of open requests per client; clients without any take no memory."""

    def __init__(self) -> None:
        self._open: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._open)

    def is_full(self, client: str, concurrent_requests: int) -> bool:
        """Return True if the client has reached its limit of open requests."""
        return self._open[client] >= concurrent_requests

    def enter(self, client: str) -> None:
        """Count a new request; each `enter` must be followed by one `leave`."""
        self._open[client] += 1

    def leave(self, client: str) -> None:
        """Stop counting a request that has ended."""
        assert self._open[client] > 0, "a request ended twice"
        self._open[client] -= 1
        if not self._open[client]:
            del self._open[client]
