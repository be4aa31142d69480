"""Answers requests byte for byte from a script, and may hang up."""

import socket
import threading
from collections.abc import Sequence
from types import TracebackType

from loadtests.load.client import StreamTiming
from loadtests.load.request_record import RequestRecord

HEAD = b"HTTP/1.1 %b\r\nx-request-id: req_%d\r\ncontent-type: %b\r\n"


def streamed(*events: bytes, number: int = 1, whole: bool = True) -> bytes:
    """Returns an event stream. If it is not `whole`, the connection ends before the stream does."""
    head = HEAD % (b"200 OK", number, b"text/event-stream") + b"transfer-encoding: chunked\r\n\r\n"
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(event), event) for event in events)
    return head + chunks + (b"0\r\n\r\n" if whole else b"")


def plain(body: bytes, status: bytes = b"200 OK", number: int = 1) -> bytes:
    return HEAD % (status, number, b"application/json") + b"content-length: %d\r\n\r\n" % len(body) + body


class ScriptedServer:
    """Gives the answers in turn, and hangs up after one that does not end."""

    def __init__(self, *answers: bytes) -> None:
        self._answers = list(answers)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.connections = 0
        self.request_bodies: list[bytes] = []
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> "ScriptedServer":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listener.close()

    def _serve(self) -> None:
        while self._answers:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            with connection, connection.makefile("rb") as reader:
                while self._answers and (head := _head(reader.readline, reader.read)):
                    self.request_bodies.append(head)
                    answer = self._answers.pop(0)
                    connection.sendall(answer)
                    if not _ends(answer):
                        break
                connection.shutdown(socket.SHUT_WR)


def _head(readline: object, read: object) -> bytes:
    lines: list[bytes] = []
    while (line := readline()) not in (b"\r\n", b""):  # type: ignore[operator]
        lines.append(line)
    length = next((int(x.split(b":")[1]) for x in lines if x.lower().startswith(b"content-length")), 0)
    return read(length) if lines else b""  # type: ignore[operator,no-any-return]


def _ends(answer: bytes) -> bool:
    return b"content-length" in answer or answer.endswith(b"0\r\n\r\n")


class RecordList:
    """Keeps what the client recorded."""

    def __init__(self) -> None:
        self.entries: list[tuple[RequestRecord, StreamTiming]] = []

    @property
    def records(self) -> Sequence[RequestRecord]:
        return [record for record, _ in self.entries]

    def record(self, record: RequestRecord, timing: StreamTiming) -> None:
        self.entries.append((record, timing))
