"""Serves scripted answers, byte for byte, and may close the connection early."""

import socket
import threading
from collections.abc import Sequence
from types import TracebackType

from loadtests.load.client import Gaps
from loadtests.load.exchange import Exchange

HEAD = b"HTTP/1.1 %b\r\nx-request-id: req_%d\r\ncontent-type: %b\r\n"


def streamed(*events: bytes, number: int = 1, complete: bool = True) -> bytes:
    """An event stream; without `complete` the connection ends before the stream does."""
    head = HEAD % (b"200 OK", number, b"text/event-stream") + b"transfer-encoding: chunked\r\n\r\n"
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(event), event) for event in events)
    return head + chunks + (b"0\r\n\r\n" if complete else b"")


def plain(body: bytes, status: bytes = b"200 OK", number: int = 1) -> bytes:
    return HEAD % (status, number, b"application/json") + b"content-length: %d\r\n\r\n" % len(body) + body


class Server:
    """Sends the answers in turn; closes after one that does not end. `connections` is a count."""

    def __init__(self, *answers: bytes) -> None:
        self._answers = list(answers)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.connections = 0
        self.asked: list[bytes] = []
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> "Server":
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
                    self.asked.append(head)
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


class Recorded:
    """Keeps the exchanges that the client recorded."""

    def __init__(self) -> None:
        self.entries: list[tuple[Exchange, Gaps]] = []

    @property
    def exchanges(self) -> Sequence[Exchange]:
        return [exchange for exchange, _ in self.entries]

    def record(self, exchange: Exchange, gaps: Gaps) -> None:
        self.entries.append((exchange, gaps))
