"""A gateway's write-ahead record: what its open requests have used, between dispatch and settlement.

One file per gateway process, locked for as long as that lives: the operating system ends the lock with the
process, however it ends, so whoever gets the lock knows that the gateway is dead. Records hold absolute
counts, so reading one twice, or two out of order, changes nothing: the highest count holds.

Counts are written every `FLUSH_S` by a thread, and nothing waits for it: what a dead gateway had counted
later than that is known to the engine (`Engine.final_usage`), and lost only if both die within it. A
request's end is written before its settlement begins. A write survives the process at once, the machine
after the next flush.
"""

import contextlib
import fcntl
import json
import logging
import os
import threading
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec

from serve.billing.metering.events import UsageEvent, UsageStatus
from serve.billing.metering.terms import RequestUsage
from serve.billing.pricing.plans import Tokens

log = logging.getLogger(__name__)

FLUSH_S = 0.1
SUFFIX, BESIDE = ".journal", ".new"
SIZE_BYTES_MAX = 4 << 20


@dataclass(frozen=True, slots=True)
class RequestEnd:
    """How a request ended, as its gateway was about to settle it."""

    status: UsageStatus
    finish_reason: str | None
    ttft_ms: int
    latency_ms: int
    at: datetime


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The last that a journal says of a request."""

    served: RequestUsage
    end: RequestEnd | None = None


class UsageCheckpoints:
    """Make it in the process whose requests it records. Only `flush` and `close` block; none raises."""

    def __init__(self, directory: Path, *, failed: Callable[[], None] = lambda: None) -> None:
        """`failed` is told of each write that fails: the disk is full, say."""
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.name = uuid.uuid4().hex
        self._path = directory / f"{self.name}{SUFFIX}"
        self._failed = failed
        # Under this name once it is locked: whoever finds it free may take it for a dead gateway's.
        beside = self._path.with_suffix(BESIDE)
        self._file = _locked(beside)
        beside.rename(self._path)
        self._size = 0
        self._beside: _Beside | None = None
        self._followed: dict[str, Callable[[], RequestUsage | None]] = {}
        self._records: dict[str, Checkpoint] = {}
        self._dirty: set[str] = set()
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._flusher = threading.Thread(target=self._follow, name="journal", daemon=True)
        self._flusher.start()

    def track(self, request_id: str, used: Callable[[], RequestUsage | None]) -> None:
        """Ask `used` at each flush what has been counted for a request until then, from any thread."""
        with self._lock:
            self._followed[request_id] = used

    def note_end(self, event: UsageEvent) -> None:
        """`event` is about to be settled; in the file when this returns."""
        served = RequestUsage(event.replica, event.boot, event.tokens, event.attempt, event.cold_loads)
        end = RequestEnd(event.status, event.finish_reason, event.ttft_ms, event.latency_ms, event.created_at)
        with self._lock:
            self._followed.pop(event.request_id, None)
            self._records[event.request_id] = record = Checkpoint(served, end)
            if self._append({event.request_id: record}):
                self._dirty.discard(event.request_id)
            else:
                self._dirty.add(event.request_id)

    def forget(self, request_id: str) -> None:
        """The request is settled or voided."""
        with self._lock:
            self._followed.pop(request_id, None)
            self._records.pop(request_id, None)
            self._dirty.discard(request_id)

    def flush(self) -> None:
        """Write what has changed, and have it on the disk. What cannot be written is tried the next time.

        The disk is waited for without the lock: the gateway's loop takes that for each request.
        """
        with self._lock:
            self._ask()
            anew = self._size > SIZE_BYTES_MAX and self._begin_anew()
            dirty = {request_id: self._records[request_id] for request_id in self._dirty}
            if dirty and self._append(dirty):
                self._dirty.clear()
        if anew:
            self._end_anew()
        with self._lock:
            file, size = self._file, self._size
        if size:
            with self._telling():
                os.fdatasync(file)

    def _ask(self) -> None:
        for request_id, used in self._followed.items():
            served, before = used(), self._records.get(request_id)
            if served is not None and (before is None or before.served != served):
                self._records[request_id] = Checkpoint(served)
                self._dirty.add(request_id)

    def close(self) -> None:
        """Stop. The file stays if a request is not closed, for the steward."""
        self._stopped.set()
        self._flusher.join()
        self.flush()
        with self._lock:
            if not self._records:
                self._path.unlink(missing_ok=True)
            os.close(self._file)

    def _follow(self) -> None:
        while not self._stopped.wait(FLUSH_S):
            try:
                self.flush()
            except Exception:
                log.exception("the journal could not be flushed")

    def _append(self, records: dict[str, Checkpoint]) -> bool:
        """Whether they are in the file, and in the one that is to be in its place."""
        data = b"".join(_line(request_id, record) for request_id, record in records.items())
        with self._telling():
            if self._beside is not None:
                _write(self._beside.file, data, self._beside.size)
                self._beside.size += len(data)
            _write(self._file, data, self._size)
            self._size += len(data)
            return True
        return False

    def _begin_anew(self) -> bool:
        """Whether there is a file with what is open only, to be in the place of one that has grown."""
        path = self._path.with_suffix(BESIDE)
        with self._telling():
            file = _locked(path)
            try:
                data = b"".join(_line(request_id, record) for request_id, record in self._records.items())
                _write(file, data, 0)
            except OSError:
                os.close(file)  # and with it the lock, for the next time
                path.unlink(missing_ok=True)
                raise
            self._beside = _Beside(path, file, len(data))
            return True
        return False

    def _end_anew(self) -> None:
        """Have that file on the disk and in its place. What is written meanwhile is in both."""
        beside = self._beside
        assert beside is not None
        with self._telling():
            try:
                os.fdatasync(beside.file)
                with self._lock:
                    beside.path.rename(self._path)
                    os.close(self._file)
                    self._file, self._size, self._beside = beside.file, beside.size, None
            except OSError:
                with self._lock:
                    self._beside = None
                os.close(beside.file)
                beside.path.unlink(missing_ok=True)
                raise

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            self._failed()
            log.exception("the journal could not be written")


@dataclass(slots=True)
class _Beside:
    """The file that will be in the journal's place."""

    path: Path
    file: int
    size: int


def _write(file: int, data: bytes, size: int) -> None:
    """Append `data` to `file` of `size` bytes, or nothing. Raises OSError."""
    written = os.write(file, data)
    if written < len(data):
        os.ftruncate(file, size)  # a line that a full disk cut off must not spoil the next one
        raise OSError("the record was not written whole")


@contextlib.contextmanager
def locked(path: Path) -> Iterator[dict[str, Checkpoint] | None]:
    """The records of a journal whose gateway is dead, and the lock on it; None if the gateway lives.

    `remove` it inside, once all of it is settled.
    """
    try:
        file = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        yield None
        return
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Not one that its gateway has just replaced.
            mine = os.fstat(file).st_ino == path.stat().st_ino
        except (BlockingIOError, FileNotFoundError):
            mine = False
        yield _read(path) if mine else None
    finally:
        os.close(file)


def remove(path: Path) -> None:
    """Nothing of a dead gateway's journal is left, nor of the one that it may have begun anew."""
    path.with_suffix(BESIDE).unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def checkpoint_files(directory: Path) -> list[Path]:
    return sorted(directory.glob(f"*{SUFFIX}"))


def _locked(path: Path) -> int:
    file = os.open(path, os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_RDWR, 0o600)
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # nobody else knows its name yet
    return file


def _line(request_id: str, record: Checkpoint) -> bytes:
    said: dict[str, Any] = {"request_id": request_id, "served": record.served}
    if record.end is not None:
        said["end"] = record.end
    return msgspec.json.encode(said) + b"\n"


def _read(path: Path) -> dict[str, Checkpoint]:
    records: dict[str, Checkpoint] = {}
    for line in path.read_bytes().split(b"\n"):
        try:
            said = json.loads(line)
            request_id, record = said["request_id"], _record(said)
        except (ValueError, KeyError, TypeError):
            continue  # the last line, of a machine that died while it was written
        before = records.get(request_id)
        records[request_id] = record if before is None else later(before, record)
    return records


def later(one: Checkpoint, other: Checkpoint) -> Checkpoint:
    """What both say together: the last attempt, its highest counts, its end if either knows it."""
    first, last = sorted((one, other), key=lambda record: record.served.attempt)
    if first.served.attempt < last.served.attempt:
        return last
    a, b = first.served.tokens, last.served.tokens
    tokens = Tokens(max(a.prompt, b.prompt), max(a.cached, b.cached), max(a.completion, b.completion))
    return Checkpoint(replace(last.served, tokens=tokens), last.end or first.end)


def _record(said: dict[str, Any]) -> Checkpoint:
    served = RequestUsage(**said["served"] | {"tokens": Tokens(**said["served"]["tokens"])})
    end = said.get("end")
    if end is None:
        return Checkpoint(served)
    moment = datetime.fromisoformat(end["at"])
    return Checkpoint(served, RequestEnd(**end | {"status": UsageStatus(end["status"]), "at": moment}))
