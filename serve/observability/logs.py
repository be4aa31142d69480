"""Logs: one line per record, in files under the home folder; and what no log may say.

`install` sets up a process. Every record made while a request is handled carries its id (`handle`). Never in
a log: keys, Authorization headers, prompts. Our own messages hold none; what others raise may hold anything,
so of an exception it is told what it is and where it came from, and its words only if they are a program's.
"""

import contextlib
import contextvars
import fcntl
import json
import logging
import logging.handlers
import os
import re
import sys
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

import sqlalchemy as sa

from finetune.errors import FinetuneError
from quantize.errors import QuantizeError
from serve.errors import BespokeError, InvalidRequest, NotFound

OURS = ("serve", "finetune", "quantize")
# What a record may say besides its message: `log.info("…", extra={"route": …})`.
FIELDS = (
    "method",
    "route",
    "status",
    "duration_ms",
    "model",
    "base",
    "adapter",
    "broken",
    "outcome",
    "finish_reason",
    "prompt_tokens",
    "cached_tokens",
    "completion_tokens",
    "ttft_ms",
    "attempt",
)
MESSAGE_CHARS_MAX, FRAMES_MAX, CAUSES_MAX = 4000, 40, 5
_JSON = json.JSONEncoder(ensure_ascii=False, default=str)
_SHARED = "BESPOKE_LOGS_OF_CHILDREN"

# Their words are a program's: names, paths, states. Anything else may quote what a client sent.
_SPEAKING = (
    *(OSError, ImportError, AttributeError, TypeError, NameError, NotImplementedError),
    *(BespokeError, FinetuneError, QuantizeError),
)
_QUOTING = (InvalidRequest, NotFound)

_SECRETS = re.compile(
    r"""\bbs[kp]-[\w-]+                    # our keys
    | (?:authorization|api[-_]?key)["']?\s*[:=,]\s*b?["']?(?:\w+\s+)?[^\s"',;)}\]]+
    | \b(?:bearer|basic)\s+[^\s"',;)}\]]+
    | (?<=://)[^/\s@]+(?=@)                # a URL's user and password
    """,
    re.IGNORECASE | re.VERBOSE,
)


@dataclass(frozen=True, slots=True)
class LogContext:
    """On whose behalf something is done: a request's id, its trace's, the span that new ones are under."""

    request_id: str | None = None
    trace_id: str | None = None
    span: object | None = None  # an opentelemetry.context.Context, if tracing is on


NOBODY = LogContext()
_handling: contextvars.ContextVar[LogContext] = contextvars.ContextVar("handling", default=NOBODY)


def log_context() -> LogContext:
    return _handling.get()


def set_log_context(request_id: str | None = None, **trace: object) -> None:
    """What this task does from now on, it does for this request; tasks and threads that it starts do too."""
    now = _handling.get()
    _handling.set(replace(now, request_id=request_id or now.request_id, **trace))  # type: ignore[arg-type]


def context_of(whose: LogContext) -> contextvars.Context:
    """A context that holds nothing else."""
    context = contextvars.Context()
    context.run(_handling.set, whose)
    return context


def without_secrets(text: str) -> str:
    return _SECRETS.sub("[redacted]", text)


def described(error: BaseException) -> str:
    """An exception in one line: its type, and its message if that cannot quote what a client sent."""
    name = f"{type(error).__module__}.{type(error).__qualname__}".removeprefix("builtins.")
    if isinstance(error, sa.exc.DBAPIError) and not isinstance(error, sa.exc.DataError):
        # A database's first line says what is wrong, the others show the row. Of wrong data all show it.
        words = str(error.orig).partition("\n")[0]
    elif isinstance(error, sa.exc.TimeoutError) or (
        isinstance(error, _SPEAKING) and not isinstance(error, _QUOTING)
    ):
        words = str(error)
    else:
        return f"{name} (its message is not logged)" if str(error) else name
    return without_secrets(f"{name}: {words[:MESSAGE_CHARS_MAX]}" if words else name)


def _chain(error: BaseException) -> Iterator[tuple[str, BaseException]]:
    """The exception and what led to it, each with how it did."""
    link, seen = "", 0
    while seen < CAUSES_MAX:
        yield link, error
        seen += 1
        if error.__cause__ is not None:
            link, error = "caused by ", error.__cause__
        elif error.__context__ is not None and not error.__suppress_context__:
            link, error = "while handling ", error.__context__
        else:
            return


def _traceback(error: BaseException) -> str:
    """Frames without the values in them; source lines are code."""
    parts = []
    for link, one in _chain(error):
        frames = traceback.extract_tb(one.__traceback__)[-FRAMES_MAX:]
        where = [f'  File "{frame.filename}", line {frame.lineno}, in {frame.name}' for frame in frames]
        parts.append("\n".join([f"{link}{described(one)}", *where]))
    return "\n".join(parts)


def _message(record: logging.LogRecord) -> str:
    if record.name == "asyncio":
        # It appends the repr of a task, with its exception, or of a callback, with its arguments.
        return re.split(r"[\n(<]", record.getMessage(), maxsplit=1)[0]
    if record.name == "py.warnings":
        return ":".join(record.getMessage().split(":")[:3])  # file, line, category; pydantic's quote values
    if isinstance(record.args, tuple) and any(isinstance(one, BaseException) for one in record.args):
        told = tuple(described(one) if isinstance(one, BaseException) else one for one in record.args)
        return str(record.msg) % told
    if isinstance(record.msg, BaseException):
        return described(record.msg)
    return record.getMessage()


def entry(record: logging.LogRecord, process: str) -> dict[str, object]:
    """A record as its line says it, in the order of the line."""
    at = datetime.fromtimestamp(record.created, UTC)
    now = _handling.get()
    said: dict[str, object] = {
        "time": at.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "level": record.levelname,
        "logger": record.name,
        "message": without_secrets(_message(record)[:MESSAGE_CHARS_MAX]),
        "process": process,
        "pid": record.process,
    }
    if now.request_id is not None:
        said["request_id"] = now.request_id
    if now.trace_id is not None:
        said["trace_id"] = now.trace_id
    for name in FIELDS:
        if (value := record.__dict__.get(name)) is not None:
            said[name] = without_secrets(value[:256]) if isinstance(value, str) else value
    if record.exc_info and record.exc_info[1] is not None:
        said["exception"] = _traceback(record.exc_info[1])
    return said


class JsonLines(logging.Formatter):
    """One JSON object per line."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        return _JSON.encode(entry(record, self._process))


class TextLines(JsonLines):
    """The same for people: time, level, logger, message, then what else is known as name=value."""

    def format(self, record: logging.LogRecord) -> str:
        said = entry(record, self._process)
        shown = " ".join(str(said.pop(name)) for name in ("time", "level", "logger", "message"))
        trace = said.pop("exception", None)
        rest = " ".join(f"{name}={value}" for name, value in said.items())
        return f"{shown} {rest}" if trace is None else f"{shown} {rest}\n{trace}"


@dataclass(frozen=True, slots=True)
class LogSpec:
    """How a service logs; `kept` rotated files of `file_bytes` each per process, beside the current one."""

    directory: str
    form: str = "json"
    level: str = "INFO"
    file_bytes: int = 16 << 20
    kept: int = 4


class LogFile(logging.handlers.RotatingFileHandler):
    """`<process>-<n>.log` of the lowest n that no living process has: files are taken over, not left behind.

    Each record is in the file when the call that made it returns, so a process may be killed at any time.
    """

    def __init__(self, spec: LogSpec, process: str) -> None:
        directory = Path(spec.directory)
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        path, self._lock_file = _claim(directory, process)
        super().__init__(path, maxBytes=spec.file_bytes, backupCount=spec.kept, encoding="utf-8")
        self.setFormatter((JsonLines if spec.form == "json" else TextLines)(process))

    def shouldRollover(self, record: logging.LogRecord) -> bool:
        """By the file as it is; the stdlib's way formats every record twice."""
        return self.stream is not None and os.fstat(self.stream.fileno()).st_size >= self.maxBytes

    def handleError(self, record: logging.LogRecord) -> None:
        """A full disk must not fail a request. The stdlib would print the record, secrets and all."""
        with contextlib.suppress(OSError, AttributeError, ValueError):
            error = sys.exc_info()[1]
            what = "?" if error is None else described(error)
            sys.__stderr__.write(f"a record of {record.name} is not logged: {what}\n")  # type: ignore[union-attr]

    def close(self) -> None:
        super().close()
        self._lock_file.close()


def _claim(directory: Path, process: str) -> tuple[Path, TextIO]:
    """A file name of this process's own, for as long as it lives: the operating system ends the lock."""
    number = 0
    while True:
        name = f"{process}-{number}"
        lock = (directory / f".{name}.lock").open("w", encoding="ascii")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            number += 1
        else:
            return directory / f"{name}.log", lock


def install(spec: LogSpec, process: str) -> None:
    """Everything that this process logs goes into its file, and nowhere else.

    Ray Serve's records too: its own file would show how a request failed with all the words of its
    exceptions. Once is enough; it may be called again.
    """
    root = logging.getLogger()
    if any(isinstance(one, LogFile) for one in root.handlers):
        return
    file = LogFile(spec, process)
    root.addHandler(file)
    root.setLevel(logging.WARNING)
    for name in OURS:
        logging.getLogger(name).setLevel(spec.level)
    logging.captureWarnings(True)
    serve = logging.getLogger("ray.serve")
    serve.handlers[:] = [file]
    serve.propagate = False  # or to the logger "ray", which prints


def install_with_children(spec: LogSpec, process: str) -> None:
    """`install`, also in the processes that vLLM starts from this one (see `serve.vllm_plugin`)."""
    install(spec, process)
    os.environ["VLLM_CONFIGURE_LOGGING"] = "0"  # or it would print to stderr, and not propagate
    os.environ[_SHARED] = json.dumps(asdict(spec) | {"process": f"{process}-vllm"})


def install_as_child(environment: Mapping[str, str] = os.environ) -> None:
    """`install` as the parent said, if it did."""
    if shared := environment.get(_SHARED):
        fields = json.loads(shared)
        install(
            LogSpec(**{name: value for name, value in fields.items() if name != "process"}), fields["process"]
        )
