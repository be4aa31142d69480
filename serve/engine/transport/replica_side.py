"""A replica's end of its connections to gateways (`channel.py`)."""

import asyncio
import contextlib
import logging
from functools import partial
from typing import Any, Protocol

from serve.engine.protocol import GenerationRequest, Take
from serve.engine.transport.errors import encode_error
from serve.engine.transport.frames import (
    Abort,
    Address,
    Cancel,
    Entry,
    Frame,
    FrameProtocol,
    Generate,
    Hello,
    LoadReport,
    commands,
)
from serve.errors import BespokeError, EngineFailed

log = logging.getLogger(__name__)

NEWS_INTERVAL_S = 0.5


class ServedEngine(Protocol):
    """The part of an engine that a desk needs."""

    @property
    def loaded_adapters(self) -> list[int]:
        """Ids of the adapters in memory."""

    async def generate(self, request: GenerationRequest, take: Take) -> None: ...

    async def abort(self, request_id: str) -> None: ...


class ReplicaServer:
    """A replica's connections, one to each gateway that it has met. `hello` is how it introduces itself."""

    def __init__(self, engine: ServedEngine, hello: Hello) -> None:
        self.engine = engine
        self.hello = hello
        self.draining = False
        self._lines: dict[Address, GatewayConnection] = {}
        self._meeting = asyncio.Lock()
        self._telling: asyncio.Task[None] | None = None

    @property
    def ongoing(self) -> int:
        return sum(len(line.running) for line in self._lines.values())

    async def connect(self, gateway: Address) -> None:
        """Connect to `gateway`, unless that is so already. Raises OSError if it cannot be reached."""
        async with self._meeting:
            if self._telling is None:
                self._telling = asyncio.create_task(self._tell())
            self._lines = {address: line for address, line in self._lines.items() if not line.lost}
            if gateway in self._lines:
                return
            loop = asyncio.get_running_loop()
            transport, line = await loop.create_connection(
                lambda: GatewayConnection(self), gateway.host, gateway.port
            )
            transport.write(gateway.token)
            self._lines[gateway] = line
            line.introduce()

    async def drain(self, timeout_s: float) -> None:
        """Take no more requests and wait for those that run."""
        self.draining = True
        self._send_load_reports()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self.ongoing:
                    await asyncio.sleep(0.05)

    async def _tell(self) -> None:
        while True:
            await asyncio.sleep(NEWS_INTERVAL_S)
            self._send_load_reports()

    def _send_load_reports(self) -> None:
        ongoing, adapters = self.ongoing, sorted(self.engine.loaded_adapters)
        for line in self._lines.values():
            line.tell(LoadReport(ongoing - len(line.running), adapters, self.draining))


class GatewayConnection(FrameProtocol):
    """The connection to one gateway. If that goes, so does all that it has asked for."""

    def __init__(self, replica_server: ReplicaServer) -> None:
        super().__init__()
        self.running: dict[str, asyncio.Task[None]] = {}
        self._replica_server = replica_server
        self._told: LoadReport | None = None
        self._entries: list[Entry] = []
        self._loop = asyncio.get_running_loop()

    def connection_lost(self, error: Exception | None) -> None:
        self.lost = True
        for task in self.running.values():
            task.cancel()

    def introduce(self) -> None:
        self._write(self._replica_server.hello)

    def tell(self, load_report: LoadReport) -> None:
        if not self.lost and load_report != self._told:
            self._told = load_report
            self._write(Frame([], load_report))

    def _read(self, frame: bytes) -> None:
        match commands.decode(frame):
            case Generate(request=request):
                task = self._loop.create_task(self._run(request))
                self.running[request.request_id] = task
                task.add_done_callback(lambda _task: self.running.pop(request.request_id))
            case Abort(request_id=request_id) if request_id in self.running:
                # In a task of its own: vLLM's abort waits for its core.
                aborting = self._loop.create_task(self._replica_server.engine.abort(request_id))
                self.running[request_id].add_done_callback(lambda _task: aborting.cancel())
            case Cancel(request_id=request_id) if request_id in self.running:
                self.running[request_id].cancel()

    async def _run(self, request: GenerationRequest) -> None:
        try:
            await self._replica_server.engine.generate(request, partial(self._send, request.request_id))
        except BespokeError as error:
            self._send(request.request_id, [encode_error(error)])
        except Exception:
            log.exception("request %s failed", request.request_id)
            self._send(request.request_id, [encode_error(EngineFailed())])

    def _send(self, request_id: str, batch: list[Any]) -> None:
        """On its way once every request of the engine's step has had its turn."""
        if self.lost:
            return
        if not self._entries:
            # vLLM hands out a step without giving up the loop.
            self._loop.call_soon(self._flush)
        self._entries.append((request_id, batch))

    def _flush(self) -> None:
        entries, self._entries = self._entries, []
        if self.lost:
            return
        try:
            self._write(Frame(entries))
        except Exception:
            log.exception("a frame could not be written")
            for request_id, batch in entries:
                self._write_alone(request_id, batch)

    def _write_alone(self, request_id: str, batch: list[Any]) -> None:
        """So that what is wrong with one request's events is that request's alone."""
        try:
            self._write(Frame([(request_id, batch)]))
        except Exception:
            log.exception("request %s is ended: its events could not be written", request_id)
            self._write(Frame([(request_id, [encode_error(EngineFailed())])]))
            if request_id in self.running:
                self.running[request_id].cancel()
