"""OpenTelemetry spans, when the extra `otel` is installed: one per request, with the seconds of each stage.

The exporter is set up by the standard variables OTEL_EXPORTER_OTLP_ENDPOINT and OTEL_SERVICE_NAME; an
application that configures a tracer provider of its own keeps it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

try:
    from opentelemetry import propagate, trace
except ImportError:
    trace = None  # type: ignore[assignment]

_NAME = "anydoor-runtime"


def configure() -> bool:
    """Sends spans to the collector that the environment names; returns whether it names one."""
    if trace is None or not os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT"):
        return False
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    os.environ.setdefault("OTEL_SERVICE_NAME", _NAME)
    provider = TracerProvider()
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)
    return True


class RequestSpan:
    """The span of one request; does nothing without OpenTelemetry."""

    def __init__(self, span: Any) -> None:
        self._span = span

    def end(self, code: str, seconds: Mapping[str, float], **attributes: str | int) -> None:
        """Notes the status and the seconds of each stage, and ends the span."""
        if self._span is None:
            return
        self._span.set_attribute("rpc.grpc.status_code", code)
        for name, value in attributes.items():
            self._span.set_attribute(f"anydoor.{name}", value)
        for stage, duration in seconds.items():
            self._span.set_attribute(f"anydoor.seconds.{stage}", duration)
        if code != "OK":
            self._span.set_status(trace.Status(trace.StatusCode.ERROR, code))
        self._span.end()


def start_request_span(method: str, metadata: Mapping[str, str]) -> RequestSpan:
    """A server span for a request, child of the caller's if `metadata` has a traceparent."""
    if trace is None:
        return RequestSpan(None)
    tracer = trace.get_tracer(_NAME)
    context = propagate.extract(metadata)
    return RequestSpan(tracer.start_span(method, context=context, kind=trace.SpanKind.SERVER))
