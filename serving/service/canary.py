"""Champion against candidate, by what they answered: counts, and when the candidate is taken out by itself.

Pure. What is compared is what users cannot tell a version from: errors of the server, and seconds a step,
because requests of many steps take longer whoever draws them.
"""

from collections import deque
from dataclasses import dataclass, field
from math import exp, lgamma
from statistics import median
from typing import Any

WINDOW = 500  # requests of a version that are looked at, the last ones
CHANCE = 0.001  # of taking out a candidate that is no worse, at one look


@dataclass
class Tally:
    """What one version did."""

    answers: int = 0
    errors: int = 0
    failed: deque[bool] = field(default_factory=lambda: deque(maxlen=WINDOW))  # the last requests
    latencies: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))  # seconds a step
    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))  # a request

    @property
    def error_rate(self) -> float:
        """Of the last requests."""
        return sum(self.failed) / len(self.failed) if self.failed else 0.0

    def as_json(self) -> dict[str, Any]:
        """For GET /v1/rollout."""
        ordered = sorted(self.seconds)
        return {
            "answers": self.answers,
            "errors": self.errors,
            "median_s": median(ordered) if ordered else None,
            "p95_s": ordered[int(0.95 * (len(ordered) - 1))] if ordered else None,
            "median_step_s": median(self.latencies) if self.latencies else None,
        }


@dataclass(frozen=True)
class Limits:
    """When a candidate is taken out; as in ServeConfig."""

    requests: int  # of the candidate before anything is concluded
    error_rate: float  # more than the champion's
    latency: float  # times the champion's median


class Canary:
    """Counts by version, since the endpoint started: of those that were champion or candidate then."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.tallies: dict[str, Tally] = {}
        self.taken_out: dict[str, str] = {}  # version -> why

    def answered(self, version: str, *, seconds: float, steps: int) -> None:
        """Count an answer that took `seconds` for pictures of `steps` each."""
        tally = self.tallies.setdefault(version, Tally())
        tally.answers += 1
        tally.failed.append(False)
        tally.seconds.append(seconds)
        tally.latencies.append(seconds / steps)

    def failed(self, version: str) -> None:
        """Count a request that the server could not answer; what the client did wrong does not count."""
        tally = self.tallies.setdefault(version, Tally())
        tally.errors += 1
        tally.failed.append(True)

    def objection(self, champion: str, candidate: str) -> str | None:
        """Why the candidate should be taken out now; None if it may stay.

        Errors: its rate lies above the champion's by the limit, and by Fisher's exact test (one-sided) so
        many more errors come by chance in fewer than one of 1 / CHANCE cases. Latency: the median second a
        step is beyond the limit's multiple of the champion's. Both need enough requests of both versions.
        """
        ours, theirs = self.tallies.get(champion, Tally()), self.tallies.get(candidate, Tally())
        requests, others = len(theirs.failed), len(ours.failed)
        if min(requests, others) < self.limits.requests:
            return None
        if theirs.error_rate - ours.error_rate > self.limits.error_rate:
            errors, other_errors = sum(theirs.failed), sum(ours.failed)
            chance = fisher_exact(errors, requests - errors, other_errors, others - other_errors)
            if chance < CHANCE:
                return (
                    f"errors: {theirs.error_rate:.1%} of the last {requests} requests, the champion's "
                    f"{ours.error_rate:.1%} of {others}; by chance in {chance:.1g} of cases"
                )
        if min(len(ours.latencies), len(theirs.latencies)) >= self.limits.requests:
            slower = median(theirs.latencies) / median(ours.latencies)
            if slower > self.limits.latency:
                return f"latency: {slower:.1f} times the champion's seconds a step, in the median"
        return None


def fisher_exact(errors: int, answers: int, other_errors: int, other_answers: int) -> float:
    """The chance of at least so many errors on the first side if both had the same rate, in 0 to 1.

    Fisher, The Design of Experiments (1935), the upper tail of the hypergeometric distribution.
    """
    first, all_errors = errors + answers, errors + other_errors
    total = first + other_errors + other_answers

    def log_choose(n: int, k: int) -> float:
        return lgamma(n + 1) - lgamma(k + 1) - lgamma(n - k + 1)

    tail = range(errors, min(first, all_errors) + 1)
    terms = (log_choose(all_errors, k) + log_choose(total - all_errors, first - k) for k in tail)
    return min(1.0, sum(exp(term - log_choose(total, first)) for term in terms))
