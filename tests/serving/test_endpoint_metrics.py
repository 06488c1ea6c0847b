"""What an operator sees: sums over replicas that come and go, few values of every label."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from serving.load import DriftScores, EngineLoad
from serving.service.metrics import COUNTED, OTHER, REASONS, Metrics
from serving.service.request_context import RequestContext

NOTHING = EngineLoad(*[0] * len(EngineLoad._fields))


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(max_queued_requests=64, min_replicas=1)


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    """Of a sample, as /metrics tells it."""
    for family in text_string_to_metric_families(metrics.render().decode()):
        for sample in family.samples:
            if sample.name == name and sample.labels == labels:
                return sample.value
    return None


def load(**counts: int) -> EngineLoad:
    return NOTHING._replace(**counts)


def test_replicas_are_summed(metrics: Metrics) -> None:
    metrics.engines(
        {
            "a": load(places=8, waiting=2, running=8, calls=10, row_steps=75, pictures=3, adapter_bytes=5),
            "b": load(places=8, waiting=1, running=4, calls=2, row_steps=5, prompt_hits=4, adapter_misses=2),
        },
        replicas=2,
    )
    expected = {
        "diffray_replicas": 2,
        "diffray_min_replicas": 1,
        "diffray_queue_length": 3,
        "diffray_rows_running": 12,
        "diffray_row_places": 16,
        "diffray_denoiser_calls_total": 12,
        "diffray_denoiser_steps_total": 80,
        "diffray_pictures_total": 3,
        "diffray_adapter_bytes": 5,
    }
    assert {name: value(metrics, name) for name in expected} == expected
    assert value(metrics, "diffray_prompt_cache_total", result="hit") == 4
    assert value(metrics, "diffray_adapter_cache_total", result="miss") == 2


def test_a_replica_that_was_started_anew_adds_to_what_the_former_one_had_done(metrics: Metrics) -> None:
    for calls in (10, 15, 3, 4):
        metrics.engines({"a": load(calls=calls)}, 1)
    assert value(metrics, "diffray_denoiser_calls_total") == 15 + 4


def test_a_replica_that_could_not_be_asked_once_is_not_counted_twice(metrics: Metrics) -> None:
    metrics.engines({"a": load(pictures=10, running=3), "b": load(pictures=5)}, 2)
    metrics.engines({"b": load(pictures=6)}, 1)
    assert value(metrics, "diffray_pictures_total") == 16
    assert value(metrics, "diffray_rows_running") == 0 and value(metrics, "diffray_replicas") == 1
    metrics.engines({"a": load(pictures=12), "b": load(pictures=6)}, 2)
    assert value(metrics, "diffray_pictures_total") == 18


@settings(deadline=None, derandomize=True)
@given(
    st.lists(
        st.dictionaries(st.sampled_from("abc"), st.lists(st.integers(0, 50), min_size=7, max_size=7)),
        max_size=12,
    )
)
def test_counters_never_go_back(rounds: list[dict[str, list[int]]]) -> None:
    metrics = Metrics(max_queued_requests=1, min_replicas=1)
    before = 0.0
    for counts in rounds:
        loads = {
            replica: load(**dict(zip(COUNTED, values, strict=True))) for replica, values in counts.items()
        }
        metrics.engines(loads, len(loads))
        now = metrics.registry.get_sample_value("diffray_denoiser_calls_total")
        assert now is not None and now >= before
        before = now


def test_replicas_that_are_gone_take_bounded_memory(metrics: Metrics) -> None:
    for number in range(2000):
        metrics.engines({f"replica {number}": load(calls=1)}, 1)
    assert len(metrics._loads) < 300
    assert value(metrics, "diffray_denoiser_calls_total") == 2000


def test_what_is_not_served_is_counted_as_other(metrics: Metrics) -> None:
    metrics.serve([("diffray", 3)])
    told: list[dict[str, Any]] = [{"model": "diffray", "version": "3"}, {"model": "x"}, {}]
    told += [{"model": f"invented {number}", "version": 3} for number in range(500)]
    for facts in told:
        metrics.answered(200, 1.5, RequestContext(**facts, alias=facts.get("model")))
        metrics.rejected(str(facts.get("model")))
    count = "diffray_request_seconds_count"
    assert value(metrics, count, model="diffray", version="3", status="200") == 1
    assert value(metrics, count, model=OTHER, version=OTHER, status="200") == 502
    assert value(metrics, "diffray_rejected_requests_total", reason=OTHER) == 503
    assert value(metrics, "diffray_answers_total", alias=OTHER, status="200") == 502
    assert metrics.render().count(b"\n") < 250


def drift(**scores: Any) -> DriftScores:
    """Scores of a window, of which only some were measured."""
    unmeasured = dict.fromkeys(("expected_fid", "clip_score", "near_copies", "expected_near_copies"))
    given: dict[str, Any] = {"num_pictures": 16, "fid": 1.0, "feature_network": "n", "scored_at": 0.0}
    return DriftScores(**given | unmeasured | scores)


def test_thousands_of_models_have_few_series_and_the_first_ones_their_own(metrics: Metrics) -> None:
    names = [(f"model {number}", 1) for number in range(5000)]
    metrics.serve(names)
    for model, version in names:
        metrics.first_step(model, version, 0.3)
    count = "diffray_first_step_seconds_count"
    assert value(metrics, count, model="model 63", version="1") == 1
    assert value(metrics, count, model=OTHER, version=OTHER) == 5000 - 64


def test_versions_that_are_served_no_more_leave_no_series(metrics: Metrics) -> None:
    for version in range(300):
        metrics.serve([("diffray", version)])
        metrics.answered(200, 1.0, RequestContext(model="diffray", version=version))
        metrics.drift("diffray", version, drift(fid=10.0))
    text = metrics.render().decode()
    assert 'version="299"' in text and 'version="298"' not in text


def test_every_reason_is_there_before_it_first_happens(metrics: Metrics) -> None:
    for reason in (*REASONS, OTHER):
        assert value(metrics, "diffray_rejected_requests_total", reason=reason) == 0


def test_drift_that_was_not_measured_is_absent(metrics: Metrics) -> None:
    labels = {"model": "diffray", "version": "3"}
    metrics.serve([("diffray", 3)])
    assert value(metrics, "diffray_drift_fid", **labels) is None
    metrics.drift("diffray", 3, drift(fid=12.5, near_copies=0.0))
    assert value(metrics, "diffray_drift_fid", **labels) == 12.5
    assert value(metrics, "diffray_drift_near_copies", **labels) == 0
    assert value(metrics, "diffray_drift_clip_score", **labels) is None
    metrics.drift("diffray", 3, drift(clip_score=0.3, expected_fid=9.0, num_passed_over=5))
    assert value(metrics, "diffray_drift_near_copies", **labels) is None
    assert value(metrics, "diffray_drift_clip_score", **labels) == 0.3
    assert value(metrics, "diffray_drift_expected_fid", **labels) == 9
    assert value(metrics, "diffray_drift_passed_over", **labels) == 5
