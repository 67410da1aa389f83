"""Traces: one OpenTelemetry span a request, sent to a collector over OTLP/HTTP, with vLLM's attribute names.

A client's `traceparent` header makes the span a child of the client's own. Spans are built when a request is over, from what its Watch
saw, and sent in batches by a thread of the SDK: a collector that is away costs nothing but the spans. Without http.traces nothing of
this is loaded.
"""

from __future__ import annotations

import time
from contextvars import ContextVar
from typing import TYPE_CHECKING

from lilliput.base.errors import UserError

if TYPE_CHECKING:
    from lilliput.serve.metrics import Watch

PARENT: ContextVar[str] = ContextVar("traceparent", default="")  # of the request that this task answers


class Tracer:
    """Sends a span for each request that is over."""

    def __init__(self, endpoint: str, model: str) -> None:
        """`endpoint`: the collector's address for traces. UserError where OpenTelemetry is not installed."""
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ModuleNotFoundError as error:
            raise UserError("http.traces needs OpenTelemetry", f"{error.name} is not installed", "pip install 'lilliput[traces]'") from error
        self.model = model
        self._provider = TracerProvider(resource=Resource.create({"service.name": "lilliput"}))
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
        self._tracer = self._provider.get_tracer("lilliput")

    def record(self, watch: Watch, seconds: float) -> None:
        """The span of a request that took so long and ends now."""
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        end, how = time.time_ns(), watch.sampling
        parent = TraceContextTextMapPropagator().extract({"traceparent": PARENT.get()})
        attributes: dict[str, str | int | float] = {
            "gen_ai.response.model": self.model,
            "gen_ai.request.max_tokens": how.max_tokens,
            "gen_ai.request.temperature": how.temperature,
            "gen_ai.request.top_p": how.top_p,
            "gen_ai.request.n": how.n,
            "gen_ai.usage.prompt_tokens": watch.prompt,
            "gen_ai.usage.completion_tokens": watch.tokens,
            "gen_ai.latency.e2e": seconds,
        }
        if watch.first is not None:
            attributes["gen_ai.latency.time_to_first_token"] = watch.first - watch.start
            attributes["gen_ai.latency.time_in_queue"] = watch.queued
        span = self._tracer.start_span("llm_request", parent, SpanKind.SERVER, attributes, start_time=end - int(seconds * 1e9))
        span.end(end)

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()
