"""Writes OpenTelemetry spans if the extra `otel` is installed: one per request, with the seconds of each
stage.

The exporter is set up by the standard variables OTEL_EXPORTER_OTLP_ENDPOINT and OTEL_SERVICE_NAME; an
application that configures a tracer provider of its own keeps it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

from runtime.rpc import compositor_pb2 as pb

try:
    from opentelemetry import propagate, trace
except ImportError:
    propagate = trace = None  # type: ignore[assignment]

_NAME = "anydoor-runtime"
_SERVICE: str = pb.DESCRIPTOR.services_by_name["CompositorService"].full_name

TRACER = trace.get_tracer(_NAME) if trace else None
"""Starts spans, which record nothing without a tracer provider. None without OpenTelemetry."""

__all__ = ["TRACER", "configure", "end_span", "start_span"]


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


def start_span(method: str, metadata: Iterable[tuple[str, str | bytes]]) -> Any:
    """Starts the span of a request, as a child of the caller's; None without OpenTelemetry."""
    if not TRACER:
        return None
    parent = propagate.extract({key: value for key, value in metadata if isinstance(value, str)})
    return TRACER.start_span(f"{_SERVICE}/{method}", parent, trace.SpanKind.SERVER)


def end_span(span: Any, code: str, seconds: Mapping[str, float], **attributes: str | int) -> None:
    """Ends the span of a request.

    Args:
        span: as `TRACER` started it.
        code: name of the gRPC status code.
        seconds: stage -> time.
        attributes: what else to note.
    """
    span.set_attribute("rpc.grpc.status_code", code)
    for name, value in attributes.items():
        span.set_attribute(f"anydoor.{name}", value)
    for stage, duration in seconds.items():
        span.set_attribute(f"anydoor.seconds.{stage}", duration)
    if code != "OK":
        span.set_status(trace.Status(trace.StatusCode.ERROR, code))
    span.end()
