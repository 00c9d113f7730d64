"""A span for each request, under the attribute names that vLLM uses, sent to an OpenTelemetry collector.

Made when a request has ended, from what `counting.py` knows of it. A client's `traceparent` header is the span's
parent.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from labkit.server.counting import Counts, Life

NAME = "llm_request"
LATENCY = "gen_ai.latency."
NEEDS = "traces need {}: pip install 'labkit[otel]'"


class Tracing:
    """Writes spans to `endpoint` (OTLP over HTTP, such as http://collector:4318/v1/traces), or to an exporter.

    >>> tracing = Tracing("http://127.0.0.1:4318/v1/traces")
    >>> tracing.follow(counts, "tiny")
    """

    def __init__(self, endpoint: str | None = None, exporter: Any = None) -> None:
        try:
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace import SpanKind
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError as error:
            raise RuntimeError(NEEDS.format(error.name)) from error
        self.processor = BatchSpanProcessor(exporter if exporter is not None else _exporter(endpoint))
        self.provider = TracerProvider(resource=Resource.create({"service.name": "labkit"}))
        self.provider.add_span_processor(self.processor)
        self.tracer = self.provider.get_tracer("labkit")
        self._kind, self._propagator = SpanKind.SERVER, TraceContextTextMapPropagator()
        self._parents: dict[str, Any] = {}  # request -> the context that its client sent

    def __repr__(self) -> str:
        return f"Tracing({self.tracer!r})"

    def note(self, ids: Sequence[str], headers: Mapping[str, str]) -> None:
        """These requests are about to be submitted."""
        if "traceparent" in headers:
            context = self._propagator.extract(dict(headers))
            self._parents.update(dict.fromkeys(ids, context))

    def forget(self, ids: Sequence[str]) -> None:
        """They were not."""
        for id in ids:
            self._parents.pop(id, None)

    def follow(self, counts: Counts, model: str) -> None:
        """Write a span for each request of this engine."""
        offset = time.time_ns() - counts.engine.clock.now()
        counts.ended.append(lambda life: self._write(life, model, offset, counts))

    def _write(self, life: Life, model: str, offset: int, counts: Counts) -> None:
        """Called in the engine's thread: the processor takes the span and sends it from a thread of its own."""
        family = life.parent or life.id
        context = self._parents.get(family)
        span = self.tracer.start_span(
            NAME, context, self._kind, attributes=attributes(life, model), start_time=life.arrival + offset
        )
        if life.reason in ("error", "rejected"):
            from opentelemetry.trace import Status, StatusCode

            span.set_status(Status(StatusCode.ERROR, life.request.error if life.request is not None else None))
        assert life.end is not None
        span.end(life.end + offset)
        if not counts.has_samples(family):
            self._parents.pop(family, None)

    def close(self, seconds: float = 3.0) -> None:
        """Send what waits, and stop; a collector that does not answer is waited for no longer than this."""
        thread = threading.Thread(target=self.provider.shutdown, name="labkit-traces", daemon=True)
        thread.start()
        thread.join(seconds)


def attributes(life: Life, model: str) -> dict[str, Any]:
    found: dict[str, Any] = {
        "gen_ai.response.model": model,
        "gen_ai.request.id": life.id,
        "gen_ai.request.n": life.family[2],
        "gen_ai.request.max_tokens": life.max_tokens,
        "gen_ai.usage.prompt_tokens": life.num_prompt,
        "gen_ai.usage.completion_tokens": life.num_output,
        "gen_ai.response.finish_reasons": (life.reason,),
    }
    if life.request is not None:
        found["gen_ai.request.temperature"] = life.request.params.temperature
        found["gen_ai.request.top_p"] = life.request.params.top_p
    times = {
        "e2e": (life.arrival, life.end),
        "time_in_queue": (life.arrival, life.admitted),
        "time_to_first_token": (life.arrival, life.first),
        "time_in_model_prefill": (life.admitted, life.first),
        "time_in_model_decode": (life.first, life.end),
        "time_in_model_inference": (life.admitted, life.end),
    }
    for name, (begin, end) in times.items():
        if begin is not None and end is not None:
            found[LATENCY + name] = max(0, end - begin) / 1e9
    return found


def _exporter(endpoint: str | None) -> Any:
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError as error:
        raise RuntimeError(NEEDS.format(error.name)) from error
    return OTLPSpanExporter(endpoint=endpoint)
