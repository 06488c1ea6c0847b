"""Compare champion and candidate by their answers, and decide when to remove the candidate automatically.

Pure. The criteria do not depend on what users request: server errors, and seconds per step, because requests
with many steps take longer with any version.
"""

from collections import deque
from dataclasses import dataclass, field
from math import exp, lgamma
from statistics import median

WINDOW = 500  # number of latest requests per version that are compared
CHANCE = 0.001  # probability of removing a candidate that is no worse, per check


@dataclass
class Tally:
    """Results of one version."""

    answers: int = 0
    errors: int = 0
    failed: deque[bool] = field(default_factory=lambda: deque(maxlen=WINDOW))  # per request, the latest ones
    latencies: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))  # seconds per step
    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))  # seconds per request

    @property
    def error_rate(self) -> float:
        """Error rate of the latest requests."""
        return sum(self.failed) / len(self.failed) if self.failed else 0.0

    def summary(self) -> "Summary":
        """Return the summary for GET /v1/rollout."""
        ordered = sorted(self.seconds)
        return Summary(
            answers=self.answers,
            errors=self.errors,
            median_s=median(ordered) if ordered else None,
            p95_s=ordered[int(0.95 * (len(ordered) - 1))] if ordered else None,
            median_step_s=median(self.latencies) if self.latencies else None,
        )


@dataclass(frozen=True)
class Summary:
    """Answers of one version since the endpoint started; durations are those of the latest requests."""

    answers: int
    errors: int
    median_s: float | None  # seconds per request
    p95_s: float | None
    median_step_s: float | None  # seconds per denoising step


@dataclass(frozen=True)
class Limits:
    """Limits beyond which a candidate is removed; as in ServeConfig."""

    requests: int  # minimum requests before anything is concluded
    error_rate: float  # allowed excess over the champion's error rate
    latency: float  # allowed multiple of the champion's median


class Canary:
    """Results since the endpoint started, by version, of versions that have been champion or candidate."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.tallies: dict[str, Tally] = {}
        self.taken_out: dict[str, str] = {}  # reason by version

    def answered(self, version: str, *, seconds: float, steps: int) -> None:
        """Count an answer that took `seconds` for images of `steps` steps each."""
        tally = self.tallies.setdefault(version, Tally())
        tally.answers += 1
        tally.failed.append(False)
        tally.seconds.append(seconds)
        tally.latencies.append(seconds / steps)

    def failed(self, version: str) -> None:
        """Count a request that failed on the server; client errors do not count."""
        tally = self.tallies.setdefault(version, Tally())
        tally.errors += 1
        tally.failed.append(True)

    def objection(self, champion: str, candidate: str) -> str | None:
        """Return the reason to remove the candidate now; None if it may stay.

        Errors: its error rate exceeds the champion's by more than the limit, with p < CHANCE in Fisher's
        exact test (one-sided). Latency: its median seconds per step exceed the limit's multiple of the
        champion's. Both criteria need enough requests of both versions.
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
                return f"latency: {slower:.1f} times the champion's median seconds per step"
        return None


def fisher_exact(errors: int, answers: int, other_errors: int, other_answers: int) -> float:
    """Return the probability (0 to 1) of at least so many errors on the first side if both rates were equal.

    Fisher, The Design of Experiments (1935), the upper tail of the hypergeometric distribution.
    """
    first, all_errors = errors + answers, errors + other_errors
    total = first + other_errors + other_answers

    def log_choose(n: int, k: int) -> float:
        return lgamma(n + 1) - lgamma(k + 1) - lgamma(n - k + 1)

    tail = range(errors, min(first, all_errors) + 1)
    terms = (log_choose(all_errors, k) + log_choose(total - all_errors, first - k) for k in tail)
    return min(1.0, sum(exp(term - log_choose(total, first)) for term in terms))
