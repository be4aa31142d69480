"""An OpenTelemetry collector: takes OTLP over HTTP on a free loopback port and keeps the spans."""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

from tests.support.waiting import wait_until


@dataclass(frozen=True)
class Received:
    """A span, as it was received."""

    service: str
    name: str
    kind: int
    trace: str
    id: str
    parent: str
    start_ns: int
    end_ns: int
    failed: bool
    message: str
    attributes: dict[str, Any]


class Collector:
    """`with Collector() as collector: collector.endpoint`."""

    def __init__(self) -> None:
        self.spans: list[Received] = []
        self.bodies: list[bytes] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                known = self.path == "/v1/traces"
                answer = ExportTraceServiceResponse().SerializeToString()
                if known:
                    collector.take(body)
                self.send_response(200 if known else 404)
                self.send_header("content-type", "application/x-protobuf")
                self.send_header("content-length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, format: str, *args: object) -> None:
                """Silent."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "Collector":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def take(self, body: bytes) -> None:
        request = ExportTraceServiceRequest.FromString(body)
        self.bodies.append(body)
        for resource in request.resource_spans:
            resource_attributes = {entry.key: value(entry.value) for entry in resource.resource.attributes}
            for scope in resource.scope_spans:
                self.spans += [
                    Received(
                        resource_attributes["service.name"],
                        span.name,
                        span.kind,
                        span.trace_id.hex(),
                        span.span_id.hex(),
                        span.parent_span_id.hex(),
                        span.start_time_unix_nano,
                        span.end_time_unix_nano,
                        span.status.code == 2,
                        span.status.message,
                        {entry.key: value(entry.value) for entry in span.attributes},
                    )
                    for span in scope.spans
                ]

    def wait_for(self, matches: Callable[[Received], bool], timeout_s: float = 30) -> Received:
        """The first span that matches; waits for it."""
        wait_until(lambda: any(matches(span) for span in self.spans), timeout_s)
        return next(span for span in self.spans if matches(span))


def value(of: Any) -> Any:
    """A protobuf AnyValue in Python's terms."""
    kind = of.WhichOneof("value")
    return [value(entry) for entry in of.array_value.values] if kind == "array_value" else getattr(of, kind)
