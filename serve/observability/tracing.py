"""Traces requests with OpenTelemetry, from the gateway's socket to vLLM's last step, and logs generations.

Tracing is off unless an endpoint is set. OpenTelemetry is not even imported then. Names follow its semantic
conventions (opentelemetry.io/docs/specs/semconv, http and gen-ai). Spans hold counts, names and codes, never
a prompt, an answer, a key or an exception's message. A thread sends ended spans from a bounded queue. A full
queue drops spans, and no request waits for the collector.
"""

import logging
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol

from serve.billing.metering.events import UsageEvent, UsageStatus
from serve.observability import logs

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.trace import Span

log = logging.getLogger(__name__)

QUEUE_SPANS_MAX, BATCH_SPANS_MAX = 4096, 512
SEND_INTERVAL_S, SEND_TIMEOUT_S, FLUSH_TIMEOUT_S = 1.0, 3.0, 3.0
TRACESTATE_CHARS_MAX = 512  # what every implementation must be able to pass on (W3C Trace Context, 3.3.1.5)


class Sampled(Protocol):
    """Describes a request's sampling, as far as spans hold it."""

    @property
    def completion_tokens_max(self) -> int | None: ...

    @property
    def temperature(self) -> float: ...

    @property
    def top_p(self) -> float: ...

    @property
    def n(self) -> int: ...


class GenerationTelemetry:
    """Logs the end of a generation. `_TracedGeneration` makes spans of its steps too."""

    def __init__(self, model: str, base: str) -> None:
        self.headers: Mapping[str, str] | None = None
        self._fields: dict[str, object] = {"model": model, "base": base}

    def step(self, name: str, **attributes: str | int) -> None:
        """Ends the current step and begins `name`."""

    def settled(self, event: UsageEvent, reasons: Sequence[str]) -> None:
        """Notes what is billed. `reasons` has one for each choice that was complete."""
        self._fields |= {
            "outcome": event.status.value,
            "adapter": event.adapter_version,
            "finish_reason": event.finish_reason,
            "prompt_tokens": event.tokens.prompt,
            "cached_tokens": event.tokens.cached,
            "completion_tokens": event.tokens.completion,
            "ttft_ms": event.ttft_ms,
            "duration_ms": event.latency_ms,
            "attempt": event.attempt,
        }

    def voided(self, reason: str, attempt: int) -> None:
        """Notes that nothing is billed."""
        self._fields |= {"outcome": "void", "finish_reason": reason, "attempt": attempt}

    def end(self) -> None:
        """Logs the generation, once its hold is closed."""
        log.info("generation %s", self._fields.get("outcome"), extra=self._fields)


class Tracing:
    """Does nothing: tracing that is off. `_Otlp` traces."""

    def request(
        self, method: str, scheme: str, parent: Mapping[str, str]
    ) -> "AbstractContextManager[Exchange]":
        """Makes the span of one HTTP request, under the client's if its headers name one."""
        return nullcontext(Exchange())

    def step(self, name: str) -> AbstractContextManager[object]:
        """Makes the span of a step of the request that this task handles."""
        return nullcontext()

    def generation(
        self, operation: str, model: str, base: str, sampling: Sampled, request_id: str
    ) -> GenerationTelemetry:
        """Begins a generation."""
        return GenerationTelemetry(model, base)

    def close(self) -> None:
        """Sends the remaining spans, for a few seconds at most. Blocks."""


class Exchange:
    """Receives the result of one HTTP request, for its span."""

    def ended(self, route: str | None, status: int | None, request_id: str | None) -> None:
        """Notes the result. `route` is the route's template; `status` is None if no answer was begun."""


OFF = Tracing()


def tracing_of(endpoint: str | None, ratio: float, process: str) -> Tracing:
    """Makes tracing to the OTLP/HTTP collector at `endpoint` (http://127.0.0.1:4318). None: off."""
    return OFF if endpoint is None else _Otlp(endpoint, ratio, process)


def traces_url(endpoint: str) -> str:
    """Returns the URL to which traces are sent: opentelemetry.io/docs/specs/otlp, OTLP/HTTP Request."""
    return f"{endpoint.rstrip('/')}/v1/traces"


# The HTTP span is our own. opentelemetry-instrumentation-asgi 0.66b2, the version that belongs to the locked
# SDK, was tried in its place:
# - It writes url.path, url.query, user_agent.original and client.address into every span, without a switch.
# - It records exceptions with their messages.
# - It takes the first of two traceparents, where the standard wants none (W3C Trace Context, 3.2.2).
# - It makes its span OpenTelemetry's current one, under which Ray's or vLLM's own would be.
# - It names and ends its span before the route's template is known.
# - It takes 1.8 to 2.8 times the CPU of ours (18 messages, its spans of single messages off, no exporter).
class _Otlp(Tracing):
    """Traces, and sends spans to a collector by OTLP over HTTP."""

    def __init__(self, endpoint: str, ratio: float, process: str) -> None:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        sampler = TraceIdRatioBased(ratio)
        self._provider = TracerProvider(
            # A client may ask not to be traced. If it asks to be traced, the ratio still holds.
            sampler=ParentBased(sampler, remote_parent_sampled=sampler),
            resource=Resource.create(
                {
                    "service.name": f"bespoke-{process}",
                    "service.instance.id": f"{socket.gethostname()}-{os.getpid()}",
                }
            ),
            shutdown_on_exit=False,
        )
        self._provider.add_span_processor(
            BatchSpanProcessor(
                OTLPSpanExporter(traces_url(endpoint), timeout=SEND_TIMEOUT_S),
                max_queue_size=QUEUE_SPANS_MAX,
                max_export_batch_size=BATCH_SPANS_MAX,
                schedule_delay_millis=SEND_INTERVAL_S * 1000,
            )
        )
        self._tracer = self._provider.get_tracer("bespoke")
        self._propagator = TraceContextTextMapPropagator()

    @contextmanager
    def request(self, method: str, scheme: str, parent: Mapping[str, str]) -> "Iterator[Exchange]":
        from opentelemetry import trace

        carrier = {name: value for name, value in parent.items() if len(value) <= TRACESTATE_CHARS_MAX}
        client_context = self._propagator.extract(carrier)
        span = self._tracer.start_span(
            method,
            client_context,
            trace.SpanKind.SERVER,
            {"http.request.method": method, "url.scheme": scheme},
        )
        _set_current(span)
        try:
            yield _TracedExchange(span, method)
        finally:
            span.end()

    @contextmanager
    def step(self, name: str) -> Iterator[object]:
        if logs.log_context().span is None:  # a batch's line has no HTTP request around it
            yield None
            return
        span = self._tracer.start_span(name, _parent())
        try:
            yield span
        except BaseException as error:
            _failed(span, type(error).__name__)
            raise
        finally:
            span.end()

    def generation(
        self, operation: str, model: str, base: str, sampling: Sampled, request_id: str
    ) -> GenerationTelemetry:
        from opentelemetry import trace

        attributes: dict[str, str | int | float | None] = {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": "bespoke",
            "gen_ai.request.model": model,
            "gen_ai.request.max_tokens": sampling.completion_tokens_max,
            "gen_ai.request.temperature": sampling.temperature,
            "gen_ai.request.top_p": sampling.top_p,
            "gen_ai.request.choice.count": sampling.n if sampling.n > 1 else None,
            "bespoke.request_id": request_id,
        }
        present = {name: value for name, value in attributes.items() if value is not None}
        span = self._tracer.start_span(f"{operation} {model}", _parent(), trace.SpanKind.CLIENT, present)
        _set_current(span)
        headers: dict[str, str] = {}
        self._propagator.inject(headers, _parent())
        return _TracedGeneration(model, base, span, self._tracer, headers)

    def close(self) -> None:
        # The library itself would wait up to 30 s for the collector.
        sending = threading.Thread(target=self._provider.shutdown, name="last-spans", daemon=True)
        sending.start()
        sending.join(FLUSH_TIMEOUT_S)


class _TracedExchange(Exchange):
    """Writes the result of one HTTP request into its span."""

    def __init__(self, span: "Span", method: str) -> None:
        self._span = span
        self._method = method

    def ended(self, route: str | None, status: int | None, request_id: str | None) -> None:
        if route is not None:
            self._span.update_name(f"{self._method} {route}")
            self._span.set_attribute("http.route", route)
        if status is not None:
            self._span.set_attribute("http.response.status_code", status)
        if request_id is not None:
            self._span.set_attribute("bespoke.request_id", request_id)
        if status is not None and status >= 500:  # a client's error is none of the server's span
            _failed(self._span, str(status))


class _TracedGeneration(GenerationTelemetry):
    """Makes a span for the generation, and under it one for each step, without gaps."""

    def __init__(self, model: str, base: str, span: "Span", tracer: Any, headers: Mapping[str, str]) -> None:
        super().__init__(model, base)
        self.headers = headers
        self._span = span
        self._tracer = tracer
        self._step: Span | None = None
        self._parent_context = _parent()

    def step(self, name: str, **attributes: str | int) -> None:
        now_ns = time.time_ns()
        if self._step is not None:
            self._step.end(now_ns)
        prefixed = {f"bespoke.{key}": value for key, value in attributes.items()}
        self._step = self._tracer.start_span(
            name, self._parent_context, attributes=prefixed, start_time=now_ns
        )

    def settled(self, event: UsageEvent, reasons: Sequence[str]) -> None:
        super().settled(event, reasons)
        self._span.set_attributes(
            {
                "gen_ai.response.model": event.adapter_version or event.base,
                "gen_ai.response.finish_reasons": list(reasons) or [event.finish_reason or "unknown"],
                "gen_ai.response.time_to_first_chunk": event.ttft_ms / 1000,
                "gen_ai.usage.input_tokens": event.tokens.prompt,
                "gen_ai.usage.cache_read.input_tokens": event.tokens.cached,
                "gen_ai.usage.output_tokens": event.tokens.completion,
                "bespoke.outcome": event.status.value,
                "bespoke.attempt": event.attempt,
                "bespoke.replica": event.replica,
            }
        )
        if event.status is UsageStatus.FAILED:
            _failed(self._span, event.finish_reason or "error")

    def voided(self, reason: str, attempt: int) -> None:
        super().voided(reason, attempt)
        self._span.set_attributes({"bespoke.outcome": "void", "bespoke.attempt": attempt})
        _failed(self._span, reason)

    def end(self) -> None:
        super().end()
        if self._step is not None:
            self._step.end()
        self._span.end()


def _parent() -> "Context":
    """Returns our own current context, never OpenTelemetry's: Ray or vLLM may trace in this process too."""
    span: Any = logs.log_context().span
    return _empty() if span is None else span


def _set_current(span: "Span") -> None:
    """Makes `span` the parent of this task's later spans, and its trace that of its log records."""
    from opentelemetry import trace

    trace_id = trace.format_trace_id(span.get_span_context().trace_id)
    logs.set_log_context(trace_id=trace_id, span=trace.set_span_in_context(span, _empty()))


def _empty() -> "Context":
    from opentelemetry.context import Context

    return Context()


def _failed(span: "Span", kind: str) -> None:
    from opentelemetry.trace import Status as SpanStatus
    from opentelemetry.trace import StatusCode

    span.set_attribute("error.type", kind)
    span.set_status(SpanStatus(StatusCode.ERROR))


def trace_id_of(headers: Mapping[str, str] | None) -> str | None:
    """Returns the trace id of a traceparent (W3C Trace Context, 3.2.2) that this program made."""
    return headers["traceparent"].split("-")[1] if headers else None


def prepare_vllm(endpoint: str | None) -> None:
    """Sets the variables that vLLM reads in each of its processes for its own spans."""
    if endpoint is None:
        return
    for name, value in {
        "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
        "OTEL_EXPORTER_OTLP_TRACES_TIMEOUT": str(SEND_TIMEOUT_S),  # also how long it delays an exit
        "OTEL_SERVICE_NAME": "bespoke-engine",
    }.items():
        os.environ.setdefault(name, value)
