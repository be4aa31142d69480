"""A client of the service for one of Locust's users: one connection, whole answers and streams.

It keeps the time itself: a stream's first token and the gaps between its events are what its users feel.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from time import monotonic, perf_counter
from typing import Any, Protocol

from gevent import GreenletExit
from geventhttpclient.client import HTTPClient
from geventhttpclient.response import HTTPParseError, HTTPSocketResponse

from loadtests.load.exchange import Exchange, Outcome
from loadtests.load.sse import DONE, events
from loadtests.load.target import Offer
from serve.billing.pricing.plans import Tokens

TIMEOUT_S = 300
# A server may close a connection that was idle for a while, just as the next request is sent on it.
IDLE_S = 2.0


@dataclass(frozen=True, slots=True)
class Call:
    """What to ask for. With `leave_after` the client goes away once it has seen that many pieces."""

    prompt: str
    max_tokens: int
    chat: bool = True
    stream: bool = True
    leave_after: int | None = None

    @property
    def path(self) -> str:
        return "/v1/chat/completions" if self.chat else "/v1/completions"

    def body(self, model: str) -> bytes:
        said: dict[str, Any] = {"model": model, "max_tokens": self.max_tokens, "temperature": 0}
        if self.chat:
            said["messages"] = [{"role": "user", "content": self.prompt}]
        else:
            said["prompt"] = self.prompt
        if self.stream:
            said |= {"stream": True, "stream_options": {"include_usage": True}}
        return json.dumps(said).encode()


@dataclass(slots=True)
class Gaps:
    """When the pieces of one stream came: the time to the first, and from each to the next."""

    started_s: float
    last_s: float | None = None
    first_ms: float | None = None
    between_ms: list[float] = field(default_factory=list)

    def piece(self, at_s: float) -> None:
        if self.last_s is None:
            self.first_ms = (at_s - self.started_s) * 1000
        else:
            self.between_ms.append((at_s - self.last_s) * 1000)
        self.last_s = at_s


class Recorder(Protocol):
    """Where exchanges go when they are over."""

    def record(self, exchange: Exchange, gaps: Gaps) -> None: ...


class Broken(Exception):
    """The answer is an error, or ended where it should not; `args` are OpenAI's code or a word of ours."""


class Client:
    """Asks one service. `expected` are the error codes that count as refusals, not as failures."""

    def __init__(self, url: str, recorder: Recorder, *, expected: frozenset[str] = frozenset()) -> None:
        self._url = url
        self._recorder = recorder
        self._expected = expected
        self._http: HTTPClient | None = None
        self._used_s = 0.0

    def ask(self, row: str, offer: Offer, call: Call) -> Exchange:
        """Sends the request, and records what became of it in `row`, whatever that is."""
        body = call.body(offer.model)
        exchange = Exchange(row, offer.tenant, offer.model, len(body), call.max_tokens)
        gaps = Gaps(perf_counter())
        try:
            self._exchange(exchange, gaps, offer, call, body)
        except Broken as broken:
            exchange.code = str(broken)
            refused = exchange.code in self._expected and exchange.status >= 400
            exchange.outcome = Outcome.REFUSED if refused else Outcome.FAILED
        except (OSError, HTTPParseError) as error:
            exchange.code = type(error).__name__
        except (ValueError, LookupError, TypeError):
            exchange.code = "malformed_answer"
        except GreenletExit:  # the run is over and does not wait any longer
            exchange.outcome = Outcome.LEFT
            raise
        finally:
            exchange.latency_ms = (perf_counter() - gaps.started_s) * 1000
            exchange.ttft_ms = gaps.first_ms
            if exchange.outcome is not Outcome.COMPLETE:
                self.close()
            self._used_s = monotonic()
            self._recorder.record(exchange, gaps)
        return exchange

    def close(self) -> None:
        if self._http is not None:
            self._http.close()
        self._http = None

    def _exchange(self, exchange: Exchange, gaps: Gaps, offer: Offer, call: Call, body: bytes) -> None:
        if monotonic() - self._used_s > IDLE_S:
            self.close()
        if self._http is None:
            self._http = HTTPClient.from_url(
                self._url, network_timeout=TIMEOUT_S, connection_timeout=TIMEOUT_S
            )
        headers = {"Authorization": f"Bearer {offer.key}", "Content-Type": "application/json"}
        with self._http.request("POST", call.path, body, headers) as answer:
            exchange.status = answer.status_code
            given = answer.get("x-request-id")
            exchange.request_id = given if isinstance(given, str) else None
            if answer.status_code != 200:
                raise Broken(_code(answer.status_code, answer.read()))
            if call.stream:
                self._stream(exchange, gaps, call, answer)
            else:
                said = json.loads(answer.read())
                exchange.tokens = _tokens(said["usage"])
                exchange.outcome = Outcome.COMPLETE

    def _stream(self, exchange: Exchange, gaps: Gaps, call: Call, answer: HTTPSocketResponse) -> None:
        if call.leave_after == 0:
            exchange.outcome = Outcome.LEFT
            return
        for data in events(_lines(answer)):
            at_s = perf_counter()
            if data == DONE:
                if exchange.tokens is None:
                    raise Broken("no_usage")
                answer.read()  # the end of the body, so that the connection can be used again
                exchange.outcome = Outcome.COMPLETE
                return
            said = json.loads(data)
            if "error" in said:
                raise Broken(said["error"].get("code") or "error")
            if said.get("usage"):
                exchange.tokens = _tokens(said["usage"])
            if any(_text(choice) for choice in said["choices"]):
                gaps.piece(at_s)
                exchange.pieces += 1
                if exchange.pieces == call.leave_after:
                    exchange.outcome = Outcome.LEFT
                    return
        raise Broken("stream_cut")


def _lines(answer: HTTPSocketResponse) -> Iterator[bytes]:
    read: Callable[[], bytes] = lambda: answer.readline(b"\n")  # noqa: E731
    return iter(read, b"")


def _text(choice: dict[str, Any]) -> str | None:
    """A piece of a chat's answer, or of a text's."""
    return choice["delta"].get("content") if "delta" in choice else choice.get("text")


def _tokens(usage: dict[str, Any]) -> Tokens:
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
    return Tokens(usage["prompt_tokens"], cached, usage["completion_tokens"])


def _code(status: int, body: bytes) -> str:
    """OpenAI's code of an error, or its HTTP status where it has none."""
    try:
        code = json.loads(body)["error"]["code"]
    except (ValueError, KeyError, TypeError):
        code = None
    return str(code or f"http_{status}")
