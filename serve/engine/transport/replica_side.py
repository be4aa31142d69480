"""Implements the replica's side of the connections to gateways (see README.md)."""

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

LOAD_REPORT_INTERVAL_S = 0.5


class ServedEngine(Protocol):
    """Describes the part of an engine that a ReplicaServer needs."""

    @property
    def loaded_adapters(self) -> list[int]:
        """Ids of the adapters in memory."""

    async def generate(self, request: GenerationRequest, take: Take) -> None: ...

    async def abort(self, request_id: str) -> None: ...


class ReplicaServer:
    """Runs gateways' requests on one engine, over a connection to each gateway. `hello` introduces it."""

    def __init__(self, engine: ServedEngine, hello: Hello) -> None:
        self.engine = engine
        self.hello = hello
        self.draining = False
        self._connections: dict[Address, GatewayConnection] = {}
        self._connecting = asyncio.Lock()
        self._reporting: asyncio.Task[None] | None = None

    @property
    def ongoing(self) -> int:
        """Counts the requests that run here, of all gateways."""
        return sum(len(connection.running) for connection in self._connections.values())

    async def connect(self, gateway: Address) -> None:
        """Connects to `gateway`, unless it is connected. Raises OSError if it cannot be reached."""
        async with self._connecting:
            if self._reporting is None:
                self._reporting = asyncio.create_task(self._report_load())
            self._connections = {
                address: connection
                for address, connection in self._connections.items()
                if not connection.lost
            }
            if gateway in self._connections:
                return
            loop = asyncio.get_running_loop()
            transport, connection = await loop.create_connection(
                lambda: GatewayConnection(self), gateway.host, gateway.port
            )
            transport.write(gateway.token)
            self._connections[gateway] = connection
            connection.introduce()

    async def drain(self, timeout_s: float) -> None:
        """Asks gateways for no more requests and waits for those that run."""
        self.draining = True
        self._send_load_reports()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self.ongoing:
                    await asyncio.sleep(0.05)

    async def _report_load(self) -> None:
        while True:
            await asyncio.sleep(LOAD_REPORT_INTERVAL_S)
            self._send_load_reports()

    def _send_load_reports(self) -> None:
        ongoing, adapters = self.ongoing, sorted(self.engine.loaded_adapters)
        for connection in self._connections.values():
            connection.send_load(LoadReport(ongoing - len(connection.running), adapters, self.draining))


class GatewayConnection(FrameProtocol):
    """Connects the replica to one gateway.

    When the connection ends, that gateway's requests are cancelled.
    """

    def __init__(self, replica_server: ReplicaServer) -> None:
        super().__init__()
        self.running: dict[str, asyncio.Task[None]] = {}
        self._replica_server = replica_server
        self._sent_report: LoadReport | None = None
        self._entries: list[Entry] = []
        self._loop = asyncio.get_running_loop()

    def connection_lost(self, error: Exception | None) -> None:
        self.lost = True
        for task in self.running.values():
            task.cancel()

    def introduce(self) -> None:
        self._write(self._replica_server.hello)

    def send_load(self, load_report: LoadReport) -> None:
        if not self.lost and load_report != self._sent_report:
            self._sent_report = load_report
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
        """Collects the events of one engine step, and sends them in one frame after the step."""
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
        """Sends one request's events in a frame of their own, so that events that cannot be written end
        their own request only."""
        try:
            self._write(Frame([(request_id, batch)]))
        except Exception:
            log.exception("request %s is ended: its events could not be written", request_id)
            self._write(Frame([(request_id, [encode_error(EngineFailed())])]))
            if request_id in self.running:
                self.running[request_id].cancel()
