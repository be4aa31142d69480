"""Checkpoints the usage of a gateway's open requests in a file, between dispatch and settlement.

Each gateway process has one file, which it locks while it lives. The operating system releases the lock
when the process ends, so a process that gets the lock knows that the gateway is dead. Records hold absolute
counts: reading one twice, or two out of order, changes nothing, because the highest count wins.

A thread writes the counts every `FLUSH_S`, and nothing waits for it. The engine knows what a dead gateway
counted after its last flush (`Engine.final_usage`); those counts are lost only if both die within
`FLUSH_S`. A request's end is written before its settlement begins. A write survives a crash of the process
at once, and a crash of the machine after the next flush.
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
SUFFIX, REPLACEMENT_SUFFIX = ".checkpoints", ".new"
SIZE_BYTES_MAX = 4 << 20


@dataclass(frozen=True, slots=True)
class RequestEnd:
    """Records how a request ended, when its gateway was about to settle it."""

    status: UsageStatus
    finish_reason: str | None
    ttft_ms: int
    latency_ms: int
    at: datetime


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Holds the latest record of one request."""

    usage: RequestUsage
    end: RequestEnd | None = None


class UsageCheckpoints:
    """Writes the checkpoints of this process's requests. Only `flush` and `close` block; no method raises."""

    def __init__(self, directory: Path, *, on_failure: Callable[[], None] = lambda: None) -> None:
        """`on_failure` is called for each write that fails, such as when the disk is full."""
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.name = uuid.uuid4().hex
        self._path = directory / f"{self.name}{SUFFIX}"
        self._on_failure = on_failure
        # Renamed once it is locked: an unlocked file of this name would look like a dead gateway's.
        replacement_path = self._path.with_suffix(REPLACEMENT_SUFFIX)
        self._file = _create_locked(replacement_path)
        replacement_path.rename(self._path)
        self._size = 0
        self._replacement: _Replacement | None = None
        self._tracked: dict[str, Callable[[], RequestUsage | None]] = {}
        self._records: dict[str, Checkpoint] = {}
        self._dirty: set[str] = set()
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._flusher = threading.Thread(target=self._flush_loop, name="checkpoints", daemon=True)
        self._flusher.start()

    def track(self, request_id: str, read_usage: Callable[[], RequestUsage | None]) -> None:
        """Call `read_usage` at each flush, from any thread, for the request's usage so far."""
        with self._lock:
            self._tracked[request_id] = read_usage

    def note_end(self, event: UsageEvent) -> None:
        """Record that `event` is about to be settled. It is in the file when this returns."""
        usage = RequestUsage(event.replica, event.boot, event.tokens, event.attempt, event.cold_loads)
        end = RequestEnd(event.status, event.finish_reason, event.ttft_ms, event.latency_ms, event.created_at)
        with self._lock:
            self._tracked.pop(event.request_id, None)
            self._records[event.request_id] = record = Checkpoint(usage, end)
            if self._append({event.request_id: record}):
                self._dirty.discard(event.request_id)
            else:
                self._dirty.add(event.request_id)

    def forget(self, request_id: str) -> None:
        """Drop a request that is settled or voided."""
        with self._lock:
            self._tracked.pop(request_id, None)
            self._records.pop(request_id, None)
            self._dirty.discard(request_id)

    def flush(self) -> None:
        """Write what has changed and sync it to the disk. A failed write is tried again the next time.

        The sync runs without the lock, because the gateway's event loop takes the lock for each request.
        """
        with self._lock:
            self._poll()
            compacting = self._size > SIZE_BYTES_MAX and self._start_compaction()
            dirty = {request_id: self._records[request_id] for request_id in self._dirty}
            if dirty and self._append(dirty):
                self._dirty.clear()
        if compacting:
            self._finish_compaction()
        with self._lock:
            file, size = self._file, self._size
        if size:
            with self._reporting_failures():
                os.fdatasync(file)

    def _poll(self) -> None:
        for request_id, read_usage in self._tracked.items():
            usage, previous = read_usage(), self._records.get(request_id)
            if usage is not None and (previous is None or previous.usage != usage):
                self._records[request_id] = Checkpoint(usage)
                self._dirty.add(request_id)

    def close(self) -> None:
        """Stop. The file stays for the steward if a request is still open."""
        self._stopped.set()
        self._flusher.join()
        self.flush()
        with self._lock:
            if not self._records:
                self._path.unlink(missing_ok=True)
            os.close(self._file)

    def _flush_loop(self) -> None:
        while not self._stopped.wait(FLUSH_S):
            try:
                self.flush()
            except Exception:
                log.exception("the checkpoints could not be flushed")

    def _append(self, records: dict[str, Checkpoint]) -> bool:
        """Append records to the file and to its replacement, if there is one. Return whether that worked."""
        data = b"".join(_encode(request_id, record) for request_id, record in records.items())
        with self._reporting_failures():
            if self._replacement is not None:
                _write(self._replacement.file, data, self._replacement.size)
                self._replacement.size += len(data)
            _write(self._file, data, self._size)
            self._size += len(data)
            return True
        return False

    def _start_compaction(self) -> bool:
        """Write a replacement file with open requests only. Return whether that worked."""
        path = self._path.with_suffix(REPLACEMENT_SUFFIX)
        with self._reporting_failures():
            file = _create_locked(path)
            try:
                data = b"".join(_encode(request_id, record) for request_id, record in self._records.items())
                _write(file, data, 0)
            except OSError:
                os.close(file)  # releases the lock, too, for the next try
                path.unlink(missing_ok=True)
                raise
            self._replacement = _Replacement(path, file, len(data))
            return True
        return False

    def _finish_compaction(self) -> None:
        """Sync the replacement and rename it over the file. Appends meanwhile go to both."""
        replacement = self._replacement
        assert replacement is not None
        with self._reporting_failures():
            try:
                os.fdatasync(replacement.file)
                with self._lock:
                    replacement.path.rename(self._path)
                    os.close(self._file)
                    self._file, self._size, self._replacement = replacement.file, replacement.size, None
            except OSError:
                with self._lock:
                    self._replacement = None
                os.close(replacement.file)
                replacement.path.unlink(missing_ok=True)
                raise

    @contextlib.contextmanager
    def _reporting_failures(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            self._on_failure()
            log.exception("the checkpoints could not be written")


@dataclass(slots=True)
class _Replacement:
    """Holds the file that will replace the one that has grown."""

    path: Path
    file: int
    size: int


def _write(file: int, data: bytes, size: int) -> None:
    """Append all of `data` to `file` of `size` bytes, or nothing. Raises OSError."""
    written = os.write(file, data)
    if written < len(data):
        os.ftruncate(file, size)  # a line cut off by a full disk must not corrupt the next one
        raise OSError("the record was not written whole")


@contextlib.contextmanager
def lock_checkpoints(path: Path) -> Iterator[dict[str, Checkpoint] | None]:
    """Lock the file of a dead gateway and yield its records. Yields None if the gateway lives.

    Call `remove_checkpoints` inside the block once all requests are resolved.
    """
    try:
        file = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        yield None
        return
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # False for a file that its gateway has just replaced.
            is_locked = os.fstat(file).st_ino == path.stat().st_ino
        except (BlockingIOError, FileNotFoundError):
            is_locked = False
        yield _read_file(path) if is_locked else None
    finally:
        os.close(file)


def remove_checkpoints(path: Path) -> None:
    """Delete a dead gateway's file, and its unfinished replacement if there is one."""
    path.with_suffix(REPLACEMENT_SUFFIX).unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def checkpoint_files(directory: Path) -> list[Path]:
    return sorted(directory.glob(f"*{SUFFIX}"))


def _create_locked(path: Path) -> int:
    file = os.open(path, os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_RDWR, 0o600)
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # no other process knows its name yet
    return file


def _encode(request_id: str, record: Checkpoint) -> bytes:
    fields: dict[str, Any] = {"request_id": request_id, "served": record.usage}
    if record.end is not None:
        fields["end"] = record.end
    return msgspec.json.encode(fields) + b"\n"


def _read_file(path: Path) -> dict[str, Checkpoint]:
    records: dict[str, Checkpoint] = {}
    for line in path.read_bytes().split(b"\n"):
        try:
            fields = json.loads(line)
            request_id, record = fields["request_id"], _decode(fields)
        except (ValueError, KeyError, TypeError):
            continue  # the last line of a machine that crashed during the write
        previous = records.get(request_id)
        records[request_id] = record if previous is None else merge(previous, record)
    return records


def merge(a_record: Checkpoint, b_record: Checkpoint) -> Checkpoint:
    """Merge two records: the last attempt, its highest counts, and its end if either has it."""
    first, last = sorted((a_record, b_record), key=lambda record: record.usage.attempt)
    if first.usage.attempt < last.usage.attempt:
        return last
    a, b = first.usage.tokens, last.usage.tokens
    tokens = Tokens(max(a.prompt, b.prompt), max(a.cached, b.cached), max(a.completion, b.completion))
    return Checkpoint(replace(last.usage, tokens=tokens), last.end or first.end)


def _decode(fields: dict[str, Any]) -> Checkpoint:
    usage = RequestUsage(**fields["served"] | {"tokens": Tokens(**fields["served"]["tokens"])})
    end = fields.get("end")
    if end is None:
        return Checkpoint(usage)
    ended_at = datetime.fromisoformat(end["at"])
    return Checkpoint(usage, RequestEnd(**end | {"status": UsageStatus(end["status"]), "at": ended_at}))
