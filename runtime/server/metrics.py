"""Prometheus metrics."""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from runtime.server.call import Call

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100)
_OCCUPANCY = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)


class Metrics:
    """Counters, histograms and gauges; `Server` sets what the gauges read when they are scraped."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, labels, registry=registry)

        def histogram(name: str, text: str, *labels: str, buckets: Sequence[float] = _SECONDS) -> Histogram:
            return Histogram(name, text, labels, buckets=buckets, registry=registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(name, text, labels, registry=registry)

        self.requests = counter(
            "anydoor_requests", "Requests that ended, by status", "method", "code", "model"
        )
        self.request_seconds = histogram(
            "anydoor_request_seconds", "From arrival to the end", "method", "model"
        )
        self.deadline_refusals = counter(
            "anydoor_deadline_refusals",
            "Requests that ended before they started because they could not meet their deadline any more",
            "model",
        )
        self.stage_seconds = histogram(
            "anydoor_stage_seconds", "Time per stage of finished requests", "stage", "model"
        )
        self.step_seconds = histogram("anydoor_step_seconds", "Calls of the step graph", "model")
        self.batch_samples = histogram(
            "anydoor_batch_samples", "Samples per call of the step graph", "model", buckets=_OCCUPANCY
        )
        self.queued = gauge("anydoor_queued_requests", "Accepted requests that wait for a slot", "model")
        self.running = gauge("anydoor_running_samples", "Samples in the batch", "model")
        self.cache_bytes = gauge("anydoor_cache_bytes", "Memory of tensors kept for later pictures", "model")
        self.loaded = gauge("anydoor_model_loaded", "1 if a request need not wait for the model", "model")
        self.loads = counter("anydoor_model_loads", "How often the model was loaded", "model")
        self.request_bytes = gauge("anydoor_request_bytes", "Memory that requests and answers take")
        self.log_lines_dropped = gauge("anydoor_log_lines_dropped", "Log lines that nobody read in time")

    def note_end(self, call: Call, code: str, seconds: float) -> None:
        """Counts a call that ended."""
        self.requests.labels(call.method, code, call.model).inc()
        self.request_seconds.labels(call.method, call.model).observe(seconds)
        for stage, duration in call.seconds.items():
            self.stage_seconds.labels(stage, call.model).observe(duration)
