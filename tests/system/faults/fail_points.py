"""Fail points: places at which a process under test kills itself or stands still.

They are put into the processes from outside, at existing seams. A test sets one by a file `POINT@MARKER` that
holds its action: "kill" (SIGKILL, by the process itself) or "stop" (stand still until the test releases it).
A request's marker is its whole last message. The first process to reach a point takes its file away, so each
acts once.
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
    """The process that reached a fail point, and for which request."""

    pid: int
    request_id: str


class FailPoints:
    """The fail points of one running application: a folder that its processes look into."""

    def __init__(self, home: Path) -> None:
        self._folder = home / "fail-points"
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
        """Lets the same fail point be set again."""
        for suffix in (".hit", ".go"):
            self._path(point, marker, suffix).unlink(missing_ok=True)

    def reach(self, point: str, marker: str | None, request_id: str) -> Path | None:
        """Returns the file to wait for, or None to go on. Does not return where the action is "kill"."""
        if marker is None:
            return None
        taken = self._path(point, marker, ".taken")
        try:
            self._path(point, marker).rename(taken)
        except FileNotFoundError:
            return None
        beside = self._path(point, marker, ".new-hit")
        beside.write_text(json.dumps({"pid": os.getpid(), "request_id": request_id}))
        beside.rename(self._path(point, marker, ".hit"))
        if taken.read_text() == KILL:
            os.kill(os.getpid(), signal.SIGKILL)
        return self._path(point, marker, ".go")

    async def pass_by(self, point: str, marker: str | None, request_id: str) -> None:
        if (go := self.reach(point, marker, request_id)) is not None:
            deadline_s = time.monotonic() + STOP_S_MAX
            while not go.exists() and time.monotonic() < deadline_s:
                await asyncio.sleep(0.01)

    def pass_by_blocking(self, point: str, marker: str | None, request_id: str) -> None:
        if (go := self.reach(point, marker, request_id)) is not None:
            deadline_s = time.monotonic() + STOP_S_MAX
            while not go.exists() and time.monotonic() < deadline_s:
                time.sleep(0.01)

    def _path(self, point: str, marker: str, suffix: str = "") -> Path:
        return self._folder / f"{point}@{marker}{suffix}"


def at(process: str, moment: str) -> str:
    """The point at which `process` comes to `moment`."""
    return f"{process}, {moment}"


class FaultyGateway(GatewayDeployment):
    async def __init__(  # type: ignore[misc] # Serve awaits it
        self, settings: Settings, contexts: dict[str, int], handles: dict[str, Any], steward: Any
    ) -> None:
        fail_points = FailPoints(settings.home)
        markers: dict[str, str | None] = {}
        _patch_generations(fail_points, markers)
        _patch_engines(fail_points)
        _patch_ledger(fail_points, "gateway", markers.get)
        assert BatchWorker.__init__.__kwdefaults__ is not None
        BatchWorker.__init__.__kwdefaults__["lease"] = BATCH_LEASE
        await super().__init__(settings, contexts, handles, steward)  # type: ignore[misc]


class FaultyEngine(EngineDeployment):
    async def __init__(self, settings: Settings, base: str) -> None:  # type: ignore[misc] # Serve awaits it
        fail_points = FailPoints(settings.home)
        await super().__init__(settings, base)  # type: ignore[misc]
        generate = self._engine.generate

        async def stopping(request: GenerationRequest, take: Take) -> None:
            async def before_next(batch: list[Event]) -> None:
                if any(isinstance(event, Accepted) for event in batch):
                    point = at("engine", BEFORE_FIRST_TOKEN)
                    await fail_points.pass_by(point, _marker_of(request.prompt), request.request_id)

            await _one_by_one(lambda slowly: generate(request, slowly), take, before_next)

        self._engine.generate = stopping  # type: ignore[method-assign]


class FaultySteward(StewardDeployment):
    def __init__(self, settings: Settings, contexts: dict[str, int], handles: dict[str, Any]) -> None:
        fail_points = FailPoints(settings.home)
        commit = recovery.Recovery._commit

        async def _commit(self: recovery.Recovery, closing: ledger.Resolution) -> bool:
            await fail_points.pass_by(at("steward", BEFORE_SETTLE), ANY, closing.request_id)
            return await commit(self, closing)

        recovery.Recovery._commit = _commit  # type: ignore[method-assign]
        _patch_ledger(fail_points, "steward", lambda _request_id: ANY)
        super().__init__(settings, contexts, handles)


def _patch_generations(fail_points: FailPoints, markers: dict[str, str | None]) -> None:
    init, close = generation.Generation.__init__, generation.Generation._settle_or_void

    def __init__(self: generation.Generation, terms: Any, principal: Any, call: Any, *rest: Any) -> None:
        markers[call.request_id] = _marker_of(call.prompt)
        init(self, terms, principal, call, *rest)

    async def _settle_or_void(self: generation.Generation, failure: Any) -> None:
        request_id = self.request.request_id
        await fail_points.pass_by(at("gateway", BEFORE_SETTLE), markers[request_id], request_id)
        await close(self, failure)
        markers.pop(request_id)

    generation.Generation.__init__ = __init__  # type: ignore[assignment, method-assign]
    generation.Generation._settle_or_void = _settle_or_void  # type: ignore[method-assign]


def _patch_engines(fail_points: FailPoints) -> None:
    ask = RemoteEngine.generate

    async def generate(self: RemoteEngine, request: GenerationRequest, take: Take) -> None:
        marker, name = _marker_of(request.prompt), request.request_id
        await fail_points.pass_by(at("gateway", BEFORE_DISPATCH), marker, name)
        tokens = 0

        async def before_next(batch: list[Event]) -> None:
            nonlocal tokens
            if any(isinstance(event, Accepted) for event in batch):
                await fail_points.pass_by(at("gateway", BEFORE_FIRST_TOKEN), marker, name)
            tokens += sum(event.tokens for event in batch if isinstance(event, Delta))
            if tokens >= MID_TOKENS:
                await fail_points.pass_by(at("gateway", IN_MID_STREAM), marker, name)

        await _one_by_one(lambda slowly: ask(self, request, slowly), take, before_next)

    RemoteEngine.generate = generate  # type: ignore[method-assign]


async def _one_by_one(
    ask: Callable[[Take], Awaitable[None]], take: Take, before_next: Callable[[list[Event]], Awaitable[None]]
) -> None:
    """Calls `ask`; gives its batches of events to `take` one by one, each after `before_next` of the last."""
    waiting: asyncio.Queue[list[Event]] = asyncio.Queue()  # an empty list is the end

    async def give() -> None:
        while batch := await waiting.get():
            take(batch)
            await before_next(batch)

    giving = asyncio.create_task(give())
    try:
        await ask(waiting.put_nowait)
    except asyncio.CancelledError:
        giving.cancel()
        raise
    finally:
        waiting.put_nowait([])
        await asyncio.wait({giving})


def _patch_ledger(fail_points: FailPoints, process: str, marker_of: Callable[[str], str | None]) -> None:
    record, close = ledger._record, writer.CommitQueue.resolve

    def _record(connection: Any, closed: list[ledger.Resolution], held: Any) -> None:
        record(connection, closed, held)
        for resolution in closed:  # in the transaction, with all rows written and locked
            fail_points.pass_by_blocking(
                at(process, DURING_SETTLE), marker_of(resolution.request_id), resolution.request_id
            )

    async def _close(self: writer.CommitQueue, closing: ledger.Resolution) -> bool:
        outcome = await close(self, closing)
        request_id = closing.request_id
        await fail_points.pass_by(at(process, AFTER_SETTLE), marker_of(request_id), request_id)
        return outcome

    ledger._record = _record
    writer.CommitQueue.resolve = _close  # type: ignore[method-assign]


def _marker_of(prompt: Any) -> str | None:
    text = getattr(prompt[-1], "content", None) if isinstance(prompt, tuple) and prompt else None
    return text if isinstance(text, str) and re.fullmatch("[a-z0-9-]{1,80}", text) else None
