"""Runs the complete gateway over HTTP with its own store, and an engine that plays a script."""

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar

import httpx
import sqlalchemy as sa

from serve.billing.metering.events import usage_table
from serve.billing.metering.terms import RequestUsage
from serve.deployment.app import build_app
from serve.engine.protocol import (
    Accepted,
    Counters,
    Delta,
    Event,
    Finished,
    GenerationRequest,
    Take,
)
from serve.settings import Settings
from tests.support.billing_fixture import onboard
from tests.support.constants import TINY

Json = dict[str, Any]
Script = Sequence[list[Event] | BaseException | str]
T = TypeVar("T")

ACCEPTED = Accepted("r", "b", 10)
FINISHED = Finished(10, 4, 2, aborted=False)
HELLO: Script = [[ACCEPTED], [Delta(0, "Hel", 1)], [Delta(0, "lo", 1, "stop"), FINISHED]]
BROKEN: Script = [[ACCEPTED], [Delta(0, "Hel", 1)], RuntimeError("a bug")]
LEFT: Script = [[ACCEPTED], [Delta(0, "Hel", 1)], "hang", [Finished(10, 4, 3, aborted=True)]]


def says(*deltas: Delta) -> Script:
    """A script that ends with the last of `deltas`."""
    return [[ACCEPTED], *([delta] for delta in deltas[:-1]), [deltas[-1], FINISHED]]


class ScriptedEngine:
    """Plays one script per attempt; the last one is repeated.

    An exception in a script is raised; "hang" waits for the abort.
    """

    context_tokens_max = 1000
    embedding_size: int | None = None

    def __init__(self, *scripts: Script) -> None:
        self._scripts = list(scripts)
        self.requests: list[GenerationRequest] = []
        self.hanging = asyncio.Event()
        self.aborts: list[str] = []
        self.aborted = asyncio.Event()

    @property
    def request_ids(self) -> list[str]:
        return [request.request_id for request in self.requests]

    async def generate(self, request: GenerationRequest, take: Take) -> None:
        async for batch in self._play(request):
            take(batch)

    async def _play(self, request: GenerationRequest) -> AsyncIterator[list[Event]]:
        if self.requests:
            self.aborted = asyncio.Event()  # the previous event may belong to another loop
        self.requests.append(request)
        for item in self._scripts.pop(0) if len(self._scripts) > 1 else self._scripts[0]:
            if isinstance(item, BaseException):
                raise item
            if isinstance(item, str):
                self.hanging.set()
                await self.aborted.wait()
            else:
                yield item

    async def abort(self, request_id: str) -> None:
        self.aborts.append(request_id)
        self.aborted.set()

    async def final_usage(self, request_id: str) -> list[RequestUsage]:
        return []

    async def counters(self) -> list[Counters]:
        return []


class ScriptedApp:
    """A gateway with the tenants acme and rival, whose engine plays `scripts`."""

    def __init__(self, home: Path, *scripts: Script, **settings: Any) -> None:
        self.engine = ScriptedEngine(*scripts)
        self.app = build_app(Settings(home=home, bases=[TINY], **settings), {TINY: self.engine})
        self.store = self.app.state.context.store
        self.gateway = self.app.state.context.gateway
        self.keys = onboard(self.store, home, ("acme", "rival"))

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        async def drained() -> T:
            try:
                return await work
            finally:
                await self.gateway.drain()

        return asyncio.run(drained())

    def ask(
        self, method: str, path: str, body: Json | None = None, *, tenant: str = "acme", **headers: str
    ) -> httpx.Response:
        async def send() -> httpx.Response:
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
                credentials = {"authorization": f"Bearer {self.keys[tenant]}"}
                return await client.request(method, path, json=body, headers=credentials | headers)

        return self.run(send())

    def say(self, path: str, body: Json, *, tenant: str = "acme") -> Json:
        """The JSON answer to a POST that must succeed."""
        answer = self.ask("POST", path, body, tenant=tenant)
        assert answer.status_code == 200, answer.text
        body_json: Json = answer.json()
        return body_json

    def stream(self, path: str, body: Json) -> list[Json]:
        """The events of a POST that must succeed. Each event's name must agree with its data."""
        answer = self.ask("POST", path, body | {"stream": True})
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"].startswith("text/event-stream")
        return sse(answer.text)

    def leave(self, path: str, body: Json, *, after: bytes = b"") -> bytes:
        """POST, and disconnect once the engine hangs and `after` was received. Returns the received bytes."""
        received = b""
        sent = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

        async def receive() -> Json:
            if sent:
                return sent.pop()
            while not self.engine.hanging.is_set() or after not in received:
                await asyncio.sleep(0.005)
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            nonlocal received
            received += message.get("body", b"")

        self.run(self.app(self.scope(path), receive, send))
        return received

    def scope(self, path: str) -> Json:
        """The ASGI scope of a POST by acme."""
        return {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "root_path": "",
            "query_string": b"",
            "headers": [(b"authorization", f"Bearer {self.keys['acme']}".encode())],
            "server": ("here", 80),
            "client": ("there", 1),
        }

    def bills(self) -> list[tuple[str, str, int, int, int]]:
        """Each usage event's tenant, status, and prompt, cached and completion tokens."""
        c = usage_table.c
        columns = (c.tenant_id, c.status, c.prompt_tokens, c.cached_tokens, c.completion_tokens)
        with self.store.read() as connection:
            return [tuple(row) for row in connection.execute(sa.select(*columns).order_by(c.id))]


def sse(text: str) -> list[Json]:
    events = []
    for block in text.strip().split("\n\n"):
        name, data = block.split("\n")
        event: Json = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        events.append(event)
    return events
