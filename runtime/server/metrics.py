"""Prometheus metrics."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from runtime.server.call import Call

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100)
_OCCUPANCY = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)


class Metrics:
    """Counters, histograms and gauges; `Server` sets what the gauges read when they are scraped."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "anydoor_requests",
            "Requests that ended, by status",
            ["method", "code", "model"],
            registry=self.registry,
        )
        self.request_seconds = Histogram(
            "anydoor_request_seconds",
            "From arrival to the end",
            ["method", "model"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.deadline_refusals = Counter(
            "anydoor_deadline_refusals",
            "Requests that ended before they started because they could not meet their deadline any more",
            ["model"],
            registry=self.registry,
        )
        self.stage_seconds = Histogram(
            "anydoor_stage_seconds",
            "Time per stage of finished requests",
            ["stage", "model"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.step_seconds = Histogram(
            "anydoor_step_seconds",
            "Calls of the step graph",
            ["model"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.batch_samples = Histogram(
            "anydoor_batch_samples",
            "Samples per call of the step graph",
            ["model"],
            buckets=_OCCUPANCY,
            registry=self.registry,
        )
        self.queued = Gauge(
            "anydoor_queued_requests",
            "Accepted requests that wait for a slot",
            ["model"],
            registry=self.registry,
        )
        self.running = Gauge(
            "anydoor_running_samples", "Samples in the batch", ["model"], registry=self.registry
        )
        self.loaded = Gauge("anydoor_model_loaded", "1 if it is", ["model"], registry=self.registry)
        self.loads = Counter(
            "anydoor_model_loads", "How often it was loaded", ["model"], registry=self.registry
        )
        self.request_bytes = Gauge(
            "anydoor_request_bytes", "Memory that requests and answers take", registry=self.registry
        )
        self.log_lines_dropped = Gauge(
            "anydoor_log_lines_dropped", "Log lines that nobody read in time", registry=self.registry
        )
        self.cache_bytes = Gauge(
            "anydoor_cache_bytes",
            "Memory of tensors kept for later pictures",
            ["model"],
            registry=self.registry,
        )

    def note_end(self, call: Call, code: str, seconds: float) -> None:
        """Counts a call that ended."""
        self.requests.labels(call.method, code, call.model).inc()
        self.request_seconds.labels(call.method, call.model).observe(seconds)
        for stage, duration in call.seconds.items():
            self.stage_seconds.labels(stage, call.model).observe(duration)
