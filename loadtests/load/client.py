"""Sends a Locust user's requests on one connection and reads whole answers and streams.

It takes the times itself, because Locust knows only one time per request: a stream also has a first token and
gaps between its events.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from time import monotonic, perf_counter
from typing import Any, Protocol

from gevent import GreenletExit
from geventhttpclient.client import HTTPClient
from geventhttpclient.response import HTTPParseError, HTTPSocketResponse

from loadtests.load.request_record import Outcome, RequestRecord
from loadtests.load.service_under_test import ModelAccess
from loadtests.load.sse import DONE, events
from serve.billing.pricing.plans import Tokens

TIMEOUT_S = 300
# After so long the connection is replaced: a server may close an idle one just when a request is sent.
IDLE_S = 2.0


@dataclass(frozen=True, slots=True)
class RequestSpec:
    """Describes a request. With `leave_after` the client disconnects once it has that many pieces."""

    prompt: str
    max_tokens: int
    chat: bool = True
    stream: bool = True
    leave_after: int | None = None

    @property
    def path(self) -> str:
        return "/v1/chat/completions" if self.chat else "/v1/completions"

    def body(self, model: str) -> bytes:
        fields: dict[str, Any] = {"model": model, "max_tokens": self.max_tokens, "temperature": 0}
        if self.chat:
            fields["messages"] = [{"role": "user", "content": self.prompt}]
        else:
            fields["prompt"] = self.prompt
        if self.stream:
            fields |= {"stream": True, "stream_options": {"include_usage": True}}
        return json.dumps(fields).encode()


@dataclass(slots=True)
class StreamTiming:
    """Holds when the pieces of one stream came: the time to the first, and from each to the next."""

    started_s: float
    last_s: float | None = None
    first_ms: float | None = None
    between_ms: list[float] = field(default_factory=list)

    def add_piece(self, at_s: float) -> None:
        if self.last_s is None:
            self.first_ms = (at_s - self.started_s) * 1000
        else:
            self.between_ms.append((at_s - self.last_s) * 1000)
        self.last_s = at_s


class Recorder(Protocol):
    """Receives the record of each request when it has ended."""

    def record(self, record: RequestRecord, timing: StreamTiming) -> None: ...


class RequestFailed(Exception):
    """Means that the response was an error or was cut. The message is OpenAI's code, or one of ours."""


class Client:
    """Sends requests to one service. `expected_codes` count as refusals, not as failures."""

    def __init__(self, url: str, recorder: Recorder, *, expected_codes: frozenset[str] = frozenset()) -> None:
        self._url = url
        self._recorder = recorder
        self._expected = expected_codes
        self._http: HTTPClient | None = None
        self._used_s = 0.0

    def send(self, row: str, model: ModelAccess, spec: RequestSpec) -> RequestRecord:
        """Sends a request and records it in `row`, however it ends."""
        body = spec.body(model.name)
        record = RequestRecord(row, model.tenant, model.name, len(body), spec.max_tokens)
        timing = StreamTiming(perf_counter())
        try:
            self._send(record, timing, model, spec, body)
        except RequestFailed as failure:
            record.code = str(failure)
            refused = record.code in self._expected and record.status >= 400
            record.outcome = Outcome.REFUSED if refused else Outcome.FAILED
        except (OSError, HTTPParseError) as error:
            record.code = type(error).__name__
        except (ValueError, LookupError, TypeError):
            record.code = "malformed_answer"
        except GreenletExit:  # the run is over and does not wait any longer
            record.outcome = Outcome.LEFT
            raise
        finally:
            record.latency_ms = (perf_counter() - timing.started_s) * 1000
            record.ttft_ms = timing.first_ms
            if record.outcome is not Outcome.COMPLETE:
                self.close()
            self._used_s = monotonic()
            self._recorder.record(record, timing)
        return record

    def close(self) -> None:
        if self._http is not None:
            self._http.close()
        self._http = None

    def _send(
        self, record: RequestRecord, timing: StreamTiming, model: ModelAccess, spec: RequestSpec, body: bytes
    ) -> None:
        if monotonic() - self._used_s > IDLE_S:
            self.close()
        if self._http is None:
            self._http = HTTPClient.from_url(
                self._url, network_timeout=TIMEOUT_S, connection_timeout=TIMEOUT_S
            )
        headers = {"Authorization": f"Bearer {model.key}", "Content-Type": "application/json"}
        with self._http.request("POST", spec.path, body, headers) as response:
            record.status = response.status_code
            request_id = response.get("x-request-id")
            record.request_id = request_id if isinstance(request_id, str) else None
            if response.status_code != 200:
                raise RequestFailed(_code(response.status_code, response.read()))
            if spec.stream:
                self._stream(record, timing, spec, response)
            else:
                record.tokens = _tokens(json.loads(response.read())["usage"])
                record.outcome = Outcome.COMPLETE

    def _stream(
        self, record: RequestRecord, timing: StreamTiming, spec: RequestSpec, response: HTTPSocketResponse
    ) -> None:
        if spec.leave_after == 0:
            record.outcome = Outcome.LEFT
            return
        for data in events(_lines(response)):
            at_s = perf_counter()
            if data == DONE:
                if record.tokens is None:
                    raise RequestFailed("no_usage")
                response.read()  # reads the end of the body, so that the connection can be reused
                record.outcome = Outcome.COMPLETE
                return
            event = json.loads(data)
            if "error" in event:
                raise RequestFailed(event["error"].get("code") or "error")
            if event.get("usage"):
                record.tokens = _tokens(event["usage"])
            if any(_text(choice) for choice in event["choices"]):
                timing.add_piece(at_s)
                record.pieces += 1
                if record.pieces == spec.leave_after:
                    record.outcome = Outcome.LEFT
                    return
        raise RequestFailed("stream_cut")


def _lines(response: HTTPSocketResponse) -> Iterator[bytes]:
    read: Callable[[], bytes] = lambda: response.readline(b"\n")  # noqa: E731
    return iter(read, b"")


def _text(choice: dict[str, Any]) -> str | None:
    """Returns the text of a chat's piece or of a text completion's."""
    return choice["delta"].get("content") if "delta" in choice else choice.get("text")


def _tokens(usage: dict[str, Any]) -> Tokens:
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
    return Tokens(usage["prompt_tokens"], cached, usage["completion_tokens"])


def _code(status: int, body: bytes) -> str:
    """Returns an error's OpenAI code, or its HTTP status if it has no code."""
    try:
        code = json.loads(body)["error"]["code"]
    except (ValueError, KeyError, TypeError):
        code = None
    return str(code or f"http_{status}")
