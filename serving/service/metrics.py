"""Metrics for operators: counters, gauges and histograms in Prometheus' format.

The HTTP layer (`serving.http.access`) reports requests; the service reports engine loads and facts about
images. Every label has few values: models and versions come from `serve`, other labels from fixed lists, and
anything else counts as "other", so that no client can create series.
"""

from collections import OrderedDict
from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from serving.load import DriftScores, EngineLoad
from serving.service.request_context import RequestContext

CONTENT_TYPE = CONTENT_TYPE_LATEST
OTHER = "other"
ALIASES = frozenset({"champion", "candidate", "shadow"})
REASONS = frozenset(
    {
        "concurrency_limit_exceeded",
        "content_policy_violation",
        "drawing_failed",
        "feedback_unavailable",
        "image_not_found",
        "invalid_form",
        "insufficient_scope",
        "invalid_api_key",
        "invalid_json",
        "invalid_value",
        "job_not_found",
        "model_lost",
        "model_not_found",
        "model_not_loaded",
        "model_refused",
        "picture_expired",
        "picture_not_found",
        "queue_full",
        "rate_limit_exceeded",
        "request_too_large",
        "safety_check_failed",
        "storage_unavailable",
        "timeout",
        "unknown_parameter",
        "unsupported_parameter",
    }
)
"""Every APIError `code` that is counted by name."""

SECONDS = (0.1, 0.25, 0.5, 1, 2, 3, 5, 7.5, 10, 15, 20, 30, 60, 120, 300)
COUNTED = (
    "calls",
    "row_steps",
    "pictures",
    "prompt_hits",
    "prompt_misses",
    "adapter_hits",
    "adapter_misses",
)
"""Fields of `EngineLoad` that never decrease while an engine lives."""


class Metrics:
    """Metrics of the endpoint, in a registry of their own. Methods may be called from any thread.

    Args:
        max_queued_requests: the setting, exported beside the number of open requests.
        min_replicas: the setting, exported beside the number of replicas.
        max_versions: maximum pairs of model and version with series of their own.
    """

    def __init__(self, *, max_queued_requests: int, min_replicas: int, max_versions: int = 64) -> None:
        self.registry = CollectorRegistry()
        self._max_versions = max_versions
        self._served: set[tuple[str, str]] = set()
        # Includes replicas that are gone: one that missed a query later reports its whole count again.
        self._loads: OrderedDict[str, EngineLoad] = OrderedDict()
        ProcessCollector(namespace="diffray", registry=self.registry)
        self._requests()
        self._engines()
        self._drift()
        for reason in (*REASONS, OTHER):
            self.rejections.labels(reason)  # exists from the start: a rate needs a value before the first
        for cache in (self.prompt_cache, self.adapter_cache):
            cache.labels("hit"), cache.labels("miss")
        self.queue_places.set(max_queued_requests)
        self.min_replicas.set(min_replicas)

    def _gauge(self, name: str, text: str, labels: tuple[str, ...] = ()) -> Gauge:
        return Gauge(f"diffray_{name}", text, labels, registry=self.registry)

    def _counter(self, name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
        return Counter(f"diffray_{name}", text, labels, registry=self.registry)

    def _seconds(self, name: str, text: str, labels: tuple[str, ...]) -> Histogram:
        return Histogram(f"diffray_{name}_seconds", text, labels, buckets=SECONDS, registry=self.registry)

    def _requests(self) -> None:
        version = ("model", "version")
        self.request_seconds = self._seconds(
            "request", "Duration of image requests, to the end of the answer", (*version, "status")
        )
        self.first_step_seconds = self._seconds(
            "first_step", "Time from an image's arrival at the engine to its first denoising step", version
        )
        self.rejections = self._counter("rejected_requests", "Requests answered with an error", ("reason",))
        self.answers = self._counter(
            "answers", "Image requests by the alias that answered them", ("alias", "status")
        )
        self.open_requests = self._gauge("open_requests", "Open image requests")
        self.queue_places = self._gauge("queue_places", "Maximum open image requests")

    def _engines(self) -> None:
        self.replicas = self._gauge("replicas", "Replicas that reported their load at the last query")
        self.min_replicas = self._gauge("min_replicas", "Minimum number of replicas")
        self.waiting = self._gauge("queue_length", "Images waiting for a slot in the engine")
        self.running = self._gauge("rows_running", "Images being denoised")
        self.places = self._gauge("row_places", "Maximum images denoised at a time")
        self.decoding = self._gauge("rows_decoding", "Images and previews waiting to be decoded")
        self.adapter_bytes = self._gauge("adapter_bytes", "Size of the adapters in memory, in bytes")
        self.calls = self._counter("denoiser_calls", "Denoiser calls")
        self.row_steps = self._counter("denoiser_steps", "Denoising steps of all images")
        self.pictures = self._counter("pictures", "Finished images")
        self.prompt_cache = self._counter(
            "prompt_cache", "Lookups in the cache of prompt embeddings", ("result",)
        )
        self.adapter_cache = self._counter("adapter_cache", "Lookups in the adapter cache", ("result",))

    def _drift(self) -> None:
        version = ("model", "version")  # with labels, a gauge is absent until it is set
        self.fid = self._gauge("drift_fid", "FID of served images against the validation split", version)
        self.clip_score = self._gauge("drift_clip_score", "Mean CLIP score of served images", version)
        self.near_copies = self._gauge(
            "drift_near_copies", "Fraction of served images that nearly copy a training image", version
        )
        self.expected_fid = self._gauge(
            "drift_expected_fid", "FID of as many images when the version was published", version
        )
        self.expected_near_copies = self._gauge(
            "drift_expected_near_copies",
            "Fraction of near copies expected of a model without memorization",
            version,
        )
        self.drift_pictures = self._gauge("drift_pictures", "Served images in the drift scores", version)
        self.drift_passed_over = self._gauge(
            "drift_passed_over", "Served images left out of the drift scores", version
        )
        self.by_drift = {
            "fid": self.fid,
            "clip_score": self.clip_score,
            "near_copies": self.near_copies,
            "expected_fid": self.expected_fid,
            "expected_near_copies": self.expected_near_copies,
            "num_pictures": self.drift_pictures,
            "num_passed_over": self.drift_passed_over,
        }

    def render(self) -> bytes:
        """Return the text for GET /metrics, of type CONTENT_TYPE."""
        return generate_latest(self.registry)

    def serve(self, versions: Iterable[tuple[str, int | str]]) -> None:
        """Set the pairs of model and version that are served from now on, the most important first.

        Only the first `max_versions` get series of their own. Series of versions that are no longer served
        are dropped, so that they do not accumulate while a server follows its registry for months.
        """
        served = list(dict.fromkeys((model, str(version)) for model, version in versions))
        kept = set(served[: self._max_versions])
        gone, self._served = self._served - kept, kept
        by_version = (self.request_seconds, self.first_step_seconds, *self.by_drift.values())
        for model, version in gone:
            for metric in by_version:
                metric.remove_by_labels({"model": model, "version": version})

    def _version(self, model: object, version: object) -> tuple[str, str]:
        pair = (str(model), str(version))
        return pair if pair in self._served else (OTHER, OTHER)

    def answered(self, status: int, seconds: float, context: RequestContext) -> None:
        """Record an image request that has ended."""
        model, version = self._version(context.model, context.version)
        self.request_seconds.labels(model, version, status).observe(seconds)
        if context.alias is not None:
            self.drawn(context.alias, status)

    def drawn(self, alias: str, status: int) -> None:
        """Count an answer by the version of an alias; including shadow answers, which no client sees."""
        self.answers.labels(alias if alias in ALIASES else OTHER, status).inc()

    def rejected(self, reason: str) -> None:
        """Count a request that was answered with an error of this code."""
        self.rejections.labels(reason if reason in REASONS else OTHER).inc()

    def first_step(self, model: str | None, version: int | str | None, seconds: float) -> None:
        """Record how many seconds an image waited for its first denoising step (`Drawing.waited_s`)."""
        self.first_step_seconds.labels(*self._version(model, version)).observe(seconds)

    def engines(self, loads: Mapping[str, EngineLoad], replicas: int) -> None:
        """Update the engine metrics from the replicas' latest loads.

        A counter that has decreased belongs to a restarted engine; its whole value is added.

        Args:
            loads: loads by a name of the replica and its engine.
            replicas: number of replicas that answered.
        """
        self.replicas.set(replicas)
        self.places.set(sum(load.places for load in loads.values()))
        self.waiting.set(sum(load.waiting for load in loads.values()))
        self.running.set(sum(load.running for load in loads.values()))
        self.decoding.set(sum(load.decoding for load in loads.values()))
        self.adapter_bytes.set(sum(load.adapter_bytes for load in loads.values()))
        for engine, load in loads.items():
            grown = _growth(self._loads.pop(engine, None), load)
            self._loads[engine] = load
            self.calls.inc(grown["calls"])
            self.row_steps.inc(grown["row_steps"])
            self.pictures.inc(grown["pictures"])
            for cache, name in ((self.prompt_cache, "prompt"), (self.adapter_cache, "adapter")):
                cache.labels("hit").inc(grown[f"{name}_hits"])
                cache.labels("miss").inc(grown[f"{name}_misses"])
        while len(self._loads) > len(loads) + 256:
            self._loads.popitem(last=False)

    def drift(self, model: str, version: int | str, scores: DriftScores) -> None:
        """Set the drift scores of a version; scores that were not measured are removed."""
        labels = self._version(model, version)
        for name, gauge in self.by_drift.items():
            value = getattr(scores, name)
            if value is None:
                gauge.remove_by_labels({"model": labels[0], "version": labels[1]})
            else:
                gauge.labels(*labels).set(value)


def _growth(before: EngineLoad | None, now: EngineLoad) -> dict[str, int]:
    """Return the increase of each field in COUNTED."""
    counts = {name: getattr(now, name) for name in COUNTED}
    if before is None or any(counts[name] < getattr(before, name) for name in COUNTED):
        return counts
    return {name: count - getattr(before, name) for name, count in counts.items()}
