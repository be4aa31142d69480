"""Where a replica under test dies or stands still: put into its process from outside, at existing seams.

A test sets a trap, a file `POINT@MARKER` that says what to do there: "kill" (SIGKILL, by the process itself)
or "stop" (stand still until the test lets it go). A request's marker is its whole last message. Whoever comes
to the point first takes the trap away, so each acts once.
"""

import asyncio
import json
import os
import re
import signal
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from serve.batches.worker import BatchWorker
from serve.billing.ledger import ledger, writer
from serve.deployment.ray_app import EngineDeployment, GatewayDeployment, StewardDeployment
from serve.engine.client import RemoteEngine
from serve.engine.protocol import Accepted, Delta, Event, GenerationRequest, Take
from serve.inference import generation
from serve.maintenance import recovery
from serve.settings import Settings

BEFORE_DISPATCH = "before dispatch"
BEFORE_FIRST_TOKEN = "before the first token"
IN_MID_STREAM = "in mid-stream"
BEFORE_SETTLE = "between last token and settle"
DURING_SETTLE = "during settle"
AFTER_SETTLE = "after settle, before the reply"
MOMENTS = (
    BEFORE_DISPATCH,
    BEFORE_FIRST_TOKEN,
    IN_MID_STREAM,
    BEFORE_SETTLE,
    DURING_SETTLE,
    AFTER_SETTLE,
)
MID_TOKENS = 40
STOP_S_MAX = 120.0
ANY = "any"  # the marker of the steward's own points
BATCH_LEASE = timedelta(seconds=6)  # instead of a minute

KILL, STOP = "kill", "stop"


@dataclass(frozen=True)
class Hit:
    """Who came to a trap, for which request."""

    pid: int
    request_id: str


class FailPoints:
    """The traps of one running application: a folder that its processes look into."""

    def __init__(self, home: Path) -> None:
        self._folder = home / "traps"
        self._folder.mkdir(exist_ok=True)

    def set(self, point: str, marker: str, action: str) -> None:
        beside = self._folder / "new"
        beside.write_text(action)
        beside.rename(self._path(point, marker))

    def hit(self, point: str, marker: str) -> Hit | None:
        try:
            return Hit(**json.loads(self._path(point, marker, ".hit").read_text()))
        except FileNotFoundError:
            return None

    def release(self, point: str, marker: str) -> None:
        self._path(point, marker, ".go").touch()

    def forget(self, point: str, marker: str) -> None:
        """The same trap may be set again."""
        for suffix in (".hit", ".go"):
            self._path(point, marker, suffix).unlink(missing_ok=True)

    def reach(self, point: str, marker: str | None, request_id: str) -> Path | None:
        """Come to `point`. Returns what to wait for, if it is to wait; does not return if it is to die."""
        if marker is None:
            return None
        taken = self._path(point, marker, ".taken")
        try:
            self._path(point, marker).rename(taken)
        except FileNotFoundError:
            return None
        beside = self._path(point, marker, ".saying")
        beside.write_text(json.dumps({"pid": os.getpid(), "request_id": request_id}))
        beside.rename(self._path(point, marker, ".hit"))
        if taken.read_text() == KILL:
            os.kill(os.getpid(), signal.SIGKILL)
        return self._path(point, marker, ".go")

    async def come(self, point: str, marker: str | None, request_id: str) -> None:
        if (go := self.reach(point, marker, request_id)) is not None:
            deadline_s = time.monotonic() + STOP_S_MAX
            while not go.exists() and time.monotonic() < deadline_s:
                await asyncio.sleep(0.01)

    def come_blocking(self, point: str, marker: str | None, request_id: str) -> None:
        if (go := self.reach(point, marker, request_id)) is not None:
            deadline_s = time.monotonic() + STOP_S_MAX
            while not go.exists() and time.monotonic() < deadline_s:
                time.sleep(0.01)

    def _path(self, point: str, marker: str, suffix: str = "") -> Path:
        return self._folder / f"{point}@{marker}{suffix}"


def at(who: str, moment: str) -> str:
    """The point at which `who` comes to `moment`."""
    return f"{who}, {moment}"


class FaultyGateway(GatewayDeployment):
    async def __init__(  # type: ignore[misc] # Serve awaits it
        self, settings: Settings, contexts: dict[str, int], handles: dict[str, Any], steward: Any
    ) -> None:
        traps = FailPoints(settings.home)
        markers: dict[str, str | None] = {}
        _watch_generations(traps, markers)
        _watch_engines(traps)
        _watch_ledger(traps, "gateway", markers.get)
        assert BatchWorker.__init__.__kwdefaults__ is not None
        BatchWorker.__init__.__kwdefaults__["lease"] = BATCH_LEASE
        await super().__init__(settings, contexts, handles, steward)  # type: ignore[misc]


class FaultyEngine(EngineDeployment):
    async def __init__(self, settings: Settings, base: str) -> None:  # type: ignore[misc] # Serve awaits it
        traps = FailPoints(settings.home)
        await super().__init__(settings, base)  # type: ignore[misc]
        generate = self._engine.generate

        async def stopping(request: GenerationRequest, take: Take) -> None:
            async def come(batch: list[Event]) -> None:
                if any(isinstance(event, Accepted) for event in batch):
                    point = at("engine", BEFORE_FIRST_TOKEN)
                    await traps.come(point, _marker_of(request.prompt), request.request_id)

            await _held_up(lambda slowly: generate(request, slowly), take, come)

        self._engine.generate = stopping  # type: ignore[method-assign]


class FaultySteward(StewardDeployment):
    def __init__(self, settings: Settings, contexts: dict[str, int], handles: dict[str, Any]) -> None:
        traps = FailPoints(settings.home)
        commit = recovery.Recovery._commit

        async def _commit(self: recovery.Recovery, closing: ledger.Resolution) -> bool:
            await traps.come(at("steward", BEFORE_SETTLE), ANY, closing.request_id)
            return await commit(self, closing)

        recovery.Recovery._commit = _commit  # type: ignore[method-assign]
        _watch_ledger(traps, "steward", lambda _request_id: ANY)
        super().__init__(settings, contexts, handles)


def _watch_generations(traps: FailPoints, markers: dict[str, str | None]) -> None:
    init, close = generation.Generation.__init__, generation.Generation._settle_or_void

    def __init__(self: generation.Generation, terms: Any, principal: Any, call: Any, *rest: Any) -> None:
        markers[call.request_id] = _marker_of(call.prompt)
        init(self, terms, principal, call, *rest)

    async def _settle_or_void(self: generation.Generation, failure: Any) -> None:
        request_id = self.request.request_id
        await traps.come(at("gateway", BEFORE_SETTLE), markers[request_id], request_id)
        await close(self, failure)
        markers.pop(request_id)

    generation.Generation.__init__ = __init__  # type: ignore[assignment, method-assign]
    generation.Generation._settle_or_void = _settle_or_void  # type: ignore[method-assign]


def _watch_engines(traps: FailPoints) -> None:
    ask = RemoteEngine.generate

    async def generate(self: RemoteEngine, request: GenerationRequest, take: Take) -> None:
        marker, name = _marker_of(request.prompt), request.request_id
        await traps.come(at("gateway", BEFORE_DISPATCH), marker, name)
        tokens = 0

        async def come(batch: list[Event]) -> None:
            nonlocal tokens
            if any(isinstance(event, Accepted) for event in batch):
                await traps.come(at("gateway", BEFORE_FIRST_TOKEN), marker, name)
            tokens += sum(event.tokens for event in batch if isinstance(event, Delta))
            if tokens >= MID_TOKENS:
                await traps.come(at("gateway", IN_MID_STREAM), marker, name)

        await _held_up(lambda slowly: ask(self, request, slowly), take, come)

    RemoteEngine.generate = generate  # type: ignore[method-assign]


async def _held_up(
    ask: Callable[[Take], Awaitable[None]], take: Take, come: Callable[[list[Event]], Awaitable[None]]
) -> None:
    """`ask`, whose events get to `take` one by one, each when `come` has let go of the one before."""
    waiting: asyncio.Queue[list[Event]] = asyncio.Queue()  # an empty list is the end

    async def give() -> None:
        while batch := await waiting.get():
            take(batch)
            await come(batch)

    giving = asyncio.create_task(give())
    try:
        await ask(waiting.put_nowait)
    except asyncio.CancelledError:
        giving.cancel()
        raise
    finally:
        waiting.put_nowait([])
        await asyncio.wait({giving})


def _watch_ledger(traps: FailPoints, who: str, marker_of: Callable[[str], str | None]) -> None:
    record, close = ledger._record, writer.CommitQueue.resolve

    def _record(connection: Any, closed: list[ledger.Resolution], held: Any) -> None:
        record(connection, closed, held)
        for one in closed:  # in the transaction, with all rows written and locked
            traps.come_blocking(at(who, DURING_SETTLE), marker_of(one.request_id), one.request_id)

    async def _close(self: writer.CommitQueue, closing: ledger.Resolution) -> bool:
        outcome = await close(self, closing)
        request_id = closing.request_id
        await traps.come(at(who, AFTER_SETTLE), marker_of(request_id), request_id)
        return outcome

    ledger._record = _record
    writer.CommitQueue.resolve = _close  # type: ignore[method-assign]


def _marker_of(prompt: Any) -> str | None:
    text = getattr(prompt[-1], "content", None) if isinstance(prompt, tuple) and prompt else None
    return text if isinstance(text, str) and re.fullmatch("[a-z0-9-]{1,80}", text) else None
