"""When a candidate is taken out by itself, on simulated answers."""

import random

import pytest

from serving.service.canary import Canary, Limits, fisher_exact

LIMITS = Limits(requests=50, error_rate=0.05, latency=2.0)


def simulated(
    *, champion: float, candidate: float, requests: int = 400, slower: float = 1.0, seed: int = 0
) -> Canary:
    """A canary after `requests` of each version, with error rates and the candidate's latency as given."""
    canary, lot = Canary(LIMITS), random.Random(seed)
    for _ in range(requests):
        for version, rate, times in (("m@1", champion, 1.0), ("m@2", candidate, slower)):
            if lot.random() < rate:
                canary.failed(version)
            else:
                steps = lot.choice([10, 20, 50])
                canary.answered(version, seconds=times * steps * lot.uniform(0.05, 0.15), steps=steps)
    return canary


def test_a_candidate_with_many_more_errors_is_taken_out() -> None:
    objection = simulated(champion=0.01, candidate=0.15).objection("m@1", "m@2")
    assert objection is not None
    assert objection.startswith("errors: ")


def test_a_candidate_that_errs_like_the_champion_stays() -> None:
    canaries = [simulated(champion=0.1, candidate=0.1, seed=seed) for seed in range(50)]
    assert not any(canary.objection("m@1", "m@2") for canary in canaries)


def test_a_little_more_errors_than_the_limit_are_borne() -> None:
    assert simulated(champion=0.0, candidate=0.03).objection("m@1", "m@2") is None


def test_a_slow_candidate_is_taken_out_whatever_the_requests_steps() -> None:
    objection = simulated(champion=0, candidate=0, slower=2.5).objection("m@1", "m@2")
    assert objection is not None
    assert objection.startswith("latency: 2.")


def test_a_candidate_that_is_slower_within_the_limit_stays() -> None:
    assert simulated(champion=0, candidate=0, slower=1.7).objection("m@1", "m@2") is None


def test_a_candidate_that_fails_after_a_long_good_time_is_taken_out_as_soon_as_a_new_one() -> None:
    canary = simulated(champion=0, candidate=0, requests=10_000)
    failures = 0
    while canary.objection("m@1", "m@2") is None:
        canary.failed("m@2")
        failures += 1
    assert failures <= 0.06 * 500 + 1


@pytest.mark.parametrize("slower", [1.0, 10.0])
def test_nothing_is_concluded_from_few_requests(slower: float) -> None:
    canary = simulated(champion=0, candidate=0.5, requests=LIMITS.requests - 1, slower=slower)
    assert canary.objection("m@1", "m@2") is None


def test_a_bad_candidate_is_taken_out_soon() -> None:
    counts = []
    for seed in range(20):
        requests = next(
            n
            for n in range(1, 1000)
            if simulated(champion=0.0, candidate=0.3, requests=n, seed=seed).objection("m@1", "m@2")
        )
        counts.append(requests)
    assert max(counts) <= 60


def test_fishers_exact_test_gives_its_published_example() -> None:
    """The lady tasting tea: all four cups right of eight by chance in 1 of 70 cases."""
    assert fisher_exact(4, 0, 0, 4) == pytest.approx(1 / 70)
    assert fisher_exact(3, 1, 1, 3) == pytest.approx(17 / 70)
    assert fisher_exact(0, 10, 5, 5) == pytest.approx(1.0)
