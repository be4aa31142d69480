"""Writes logs, one line per record, to files under the home folder, and keeps secrets out of them.

`install` sets up a process. Every record carries the id of the request that its task handles
(`set_log_context`). Keys, Authorization headers and prompts are never logged. Our own messages hold none.
Exceptions of others may hold anything, so a log names an exception's type and frames, and its message only if
it cannot quote a client.
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
# The fields that a record may have besides its message: `log.info("…", extra={"route": …})`.
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

# Their messages are a program's: names, paths, states. Any other may quote what a client sent.
_LOGGED_MESSAGES = (
    *(OSError, ImportError, AttributeError, TypeError, NameError, NotImplementedError),
    *(BespokeError, FinetuneError, QuantizeError),
)
_CLIENT_QUOTES = (InvalidRequest, NotFound)

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
    """Names the request that a task works for: its id, its trace's id, the parent of new spans."""

    request_id: str | None = None
    trace_id: str | None = None
    span: object | None = None  # an opentelemetry.context.Context, if tracing is on


NOBODY = LogContext()
_current: contextvars.ContextVar[LogContext] = contextvars.ContextVar("log_context", default=NOBODY)


def log_context() -> LogContext:
    return _current.get()


def set_log_context(request_id: str | None = None, **trace: object) -> None:
    """Sets the request that this task works for, and the tasks and threads that it starts from now on."""
    before = _current.get()
    _current.set(replace(before, request_id=request_id or before.request_id, **trace))  # type: ignore[arg-type]


def context_of(log_context: LogContext) -> contextvars.Context:
    """Makes a contextvars.Context that holds only `log_context`."""
    context = contextvars.Context()
    context.run(_current.set, log_context)
    return context


def without_secrets(text: str) -> str:
    return _SECRETS.sub("[redacted]", text)


def described(error: BaseException) -> str:
    """Describes an exception in one line: its type, and its message if that cannot quote a client."""
    name = f"{type(error).__module__}.{type(error).__qualname__}".removeprefix("builtins.")
    if isinstance(error, sa.exc.DBAPIError) and not isinstance(error, sa.exc.DataError):
        # A database's first line names the error, the others show the row. For DataError all lines show it.
        message = str(error.orig).partition("\n")[0]
    elif isinstance(error, sa.exc.TimeoutError) or (
        isinstance(error, _LOGGED_MESSAGES) and not isinstance(error, _CLIENT_QUOTES)
    ):
        message = str(error)
    else:
        return f"{name} (its message is not logged)" if str(error) else name
    return without_secrets(f"{name}: {message[:MESSAGE_CHARS_MAX]}" if message else name)


def _chain(error: BaseException) -> Iterator[tuple[str, BaseException]]:
    """Yields the exception and those that led to it, each with its relation to the one before."""
    link, count = "", 0
    while count < CAUSES_MAX:
        yield link, error
        count += 1
        if error.__cause__ is not None:
            link, error = "caused by ", error.__cause__
        elif error.__context__ is not None and not error.__suppress_context__:
            link, error = "while handling ", error.__context__
        else:
            return


def _traceback(error: BaseException) -> str:
    """Renders the frames of the chain, without values of variables."""
    parts = []
    for link, exception in _chain(error):
        frames = traceback.extract_tb(exception.__traceback__)[-FRAMES_MAX:]
        where = [f'  File "{frame.filename}", line {frame.lineno}, in {frame.name}' for frame in frames]
        parts.append("\n".join([f"{link}{described(exception)}", *where]))
    return "\n".join(parts)


def _message(record: logging.LogRecord) -> str:
    if record.name == "asyncio":
        # It appends the repr of a task, with its exception, or of a callback, with its arguments.
        return re.split(r"[\n(<]", record.getMessage(), maxsplit=1)[0]
    if record.name == "py.warnings":
        return ":".join(record.getMessage().split(":")[:3])  # file, line, category; pydantic's quote values
    if isinstance(record.args, tuple) and any(
        isinstance(argument, BaseException) for argument in record.args
    ):
        arguments = tuple(
            described(argument) if isinstance(argument, BaseException) else argument
            for argument in record.args
        )
        return str(record.msg) % arguments
    if isinstance(record.msg, BaseException):
        return described(record.msg)
    return record.getMessage()


def entry(record: logging.LogRecord, process: str) -> dict[str, object]:
    """Returns the fields of a record's line, in their order."""
    at = datetime.fromtimestamp(record.created, UTC)
    context = _current.get()
    fields: dict[str, object] = {
        "time": at.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "level": record.levelname,
        "logger": record.name,
        "message": without_secrets(_message(record)[:MESSAGE_CHARS_MAX]),
        "process": process,
        "pid": record.process,
    }
    if context.request_id is not None:
        fields["request_id"] = context.request_id
    if context.trace_id is not None:
        fields["trace_id"] = context.trace_id
    for name in FIELDS:
        if (value := record.__dict__.get(name)) is not None:
            fields[name] = without_secrets(value[:256]) if isinstance(value, str) else value
    if record.exc_info and record.exc_info[1] is not None:
        fields["exception"] = _traceback(record.exc_info[1])
    return fields


class JsonLines(logging.Formatter):
    """Formats a record as one JSON object on one line."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        return _JSON.encode(entry(record, self._process))


class TextLines(JsonLines):
    """Formats a record for people: time, level, logger, message, then the other fields as name=value."""

    def format(self, record: logging.LogRecord) -> str:
        fields = entry(record, self._process)
        head = " ".join(str(fields.pop(name)) for name in ("time", "level", "logger", "message"))
        trace = fields.pop("exception", None)
        rest = " ".join(f"{name}={value}" for name, value in fields.items())
        return f"{head} {rest}" if trace is None else f"{head} {rest}\n{trace}"


@dataclass(frozen=True, slots=True)
class LogSpec:
    """Configures a service's logs.

    A process has `rotated_files` of `file_bytes` each beside the current one.
    """

    directory: str
    form: str = "json"
    level: str = "INFO"
    file_bytes: int = 16 << 20
    rotated_files: int = 4


class LogFile(logging.handlers.RotatingFileHandler):
    """Writes `<process>-<n>.log` with the lowest n that no living process has, so that files are reused.

    Each record is in the file when the call that made it returns, so a process may be killed at any time.
    """

    def __init__(self, spec: LogSpec, process: str) -> None:
        directory = Path(spec.directory)
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        path, self._lock_file = _claim(directory, process)
        super().__init__(path, maxBytes=spec.file_bytes, backupCount=spec.rotated_files, encoding="utf-8")
        self.setFormatter((JsonLines if spec.form == "json" else TextLines)(process))

    def shouldRollover(self, record: logging.LogRecord) -> bool:
        """Decides by the file's size. The standard library would format every record twice."""
        return self.stream is not None and os.fstat(self.stream.fileno()).st_size >= self.maxBytes

    def handleError(self, record: logging.LogRecord) -> None:
        """Reports a failed write to stderr. A full disk must not fail a request.

        The standard library would print the record, secrets and all.
        """
        with contextlib.suppress(OSError, AttributeError, ValueError):
            error = sys.exc_info()[1]
            reason = "?" if error is None else described(error)
            sys.__stderr__.write(f"a record of {record.name} is not logged: {reason}\n")  # type: ignore[union-attr]

    def close(self) -> None:
        super().close()
        self._lock_file.close()


def _claim(directory: Path, process: str) -> tuple[Path, TextIO]:
    """Claims a file name for as long as this process lives. The operating system ends the lock."""
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
    """Directs everything that this process logs to its file, and nowhere else.

    This includes Ray Serve's records, whose own file would hold exceptions with all their words. A second
    call does nothing.
    """
    root = logging.getLogger()
    if any(isinstance(handler, LogFile) for handler in root.handlers):
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
    """Installs logging here, and in the processes that vLLM starts from this one (`serve.vllm_plugin`)."""
    install(spec, process)
    os.environ["VLLM_CONFIGURE_LOGGING"] = "0"  # or it would print to stderr, and not propagate
    os.environ[_SHARED] = json.dumps(asdict(spec) | {"process": f"{process}-vllm"})


def install_as_child(environment: Mapping[str, str] = os.environ) -> None:
    """Installs logging as the parent process has configured it, if it has."""
    if shared := environment.get(_SHARED):
        fields = json.loads(shared)
        install(
            LogSpec(**{name: value for name, value in fields.items() if name != "process"}), fields["process"]
        )
