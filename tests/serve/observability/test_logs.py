"""Checks what log lines hold, where they are stored, and that no key and no prompt is in any."""

import asyncio
import gc
import json
import logging
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pydantic
import pytest
import sqlalchemy as sa

from serve.engine.protocol import Accepted, Delta, Finished
from serve.errors import EngineLost, EngineUnavailable, InvalidRequest
from serve.observability import logs
from serve.storage.database import Store
from tests.serve.observability.test_tracing import BODY, CHAT, MARKER
from tests.support.logs import LogFiles
from tests.support.scripted_app import HELLO, LEFT, Script, ScriptedApp

SAID = "the-model-s-own-words"
SAYING: Script = [[Accepted("r", "b", 10)], [Delta(0, SAID, 1, "stop"), Finished(10, 4, 1, aborted=False)]]
log = logging.getLogger("serve.somewhere")


@contextmanager
def logging_to(directory: Path, **spec: object) -> Iterator[logs.LogFile]:
    """Lets this process log as a gateway does, within the block."""
    root = logging.getLogger()
    levels = {logger: logger.level for logger in (root, *map(logging.getLogger, logs.OURS))}
    logs.install(logs.LogSpec(str(directory), **spec), "gateway")  # type: ignore[arg-type]
    (file,) = [handler for handler in root.handlers if isinstance(handler, logs.LogFile)]
    try:
        yield file
    finally:
        root.removeHandler(file)
        file.close()
        logging.captureWarnings(False)
        for logger, level in levels.items():
            logger.setLevel(level)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "logs"


@pytest.fixture
def log_files(directory: Path) -> Iterator[LogFiles]:
    """Gives the log files, which are read when their text is first used."""
    with logging_to(directory):
        yield LogFiles(directory)


def test_a_request_is_told_by_its_answer_and_its_generation(tmp_path: Path, log_files: LogFiles) -> None:
    before = datetime.now(UTC) - timedelta(milliseconds=1)
    scripted_app = ScriptedApp(tmp_path, HELLO)
    answer = scripted_app.ask("POST", CHAT, BODY)
    records = {record["message"]: record for record in log_files.of(answer.headers["x-request-id"])}
    answered, generation = records.pop("answered"), records.pop("generation complete")
    assert not records
    for record in (answered, generation):
        at = record.pop("time")
        assert at.endswith("Z")
        assert before <= datetime.fromisoformat(at) <= datetime.now(UTC)
        assert record.pop("duration_ms") >= 0
        assert record.pop("request_id").startswith("req_")
        assert (record.pop("process"), record.pop("pid")) == ("gateway", os.getpid())
        assert record.pop("level") == "INFO"
    assert generation.pop("ttft_ms") >= 0
    assert answered == {
        "logger": "serve.api.middleware",
        "message": "answered",
        "method": "POST",
        "route": CHAT,
        "status": 200,
    }
    assert generation == {
        "logger": "serve.observability.tracing",
        "message": "generation complete",
        "model": "tiny",
        "base": "tiny",
        "outcome": "complete",
        "finish_reason": "stop",
        "prompt_tokens": 10,
        "cached_tokens": 4,
        "completion_tokens": 2,
        "attempt": 1,
    }


def test_what_goes_wrong_in_a_task_of_its_own_still_names_the_request(
    tmp_path: Path, log_files: LogFiles
) -> None:
    """Generations run in an empty context, so that Ray cannot cancel them with their client."""
    scripted_app = ScriptedApp(tmp_path, [EngineLost()], [RuntimeError("a bug")])
    answer = scripted_app.ask("POST", CHAT, BODY)
    messages = [
        (record["level"], record["message"]) for record in log_files.of(answer.headers["x-request-id"])
    ]
    request = f"request {answer.headers['x-request-id']}"
    assert messages == [
        ("WARNING", f"{request} lost its replica and is tried again"),
        ("ERROR", f"{request} failed"),
        ("INFO", "generation void"),
        ("INFO", "answered"),
    ]
    # What is logged under no request names none.
    log.info("nobody's")
    assert "request_id" not in json.loads(LogFiles(log_files._paths[0].parent).text.splitlines()[-1])


def test_a_line_names_the_trace_if_there_is_one(tmp_path: Path, log_files: LogFiles) -> None:
    trace = "0af7651916cd43dd8448eb211c80319c"
    scripted_app = ScriptedApp(tmp_path, HELLO, otlp_endpoint="http://127.0.0.1:9")
    answer = scripted_app.ask("POST", CHAT, BODY, traceparent=f"00-{trace}-b7ad6b7169203331-01")
    scripted_app.gateway.context.tracing.close()
    records = log_files.of(answer.headers["x-request-id"])
    assert len(records) == 2
    assert {record["trace_id"] for record in records} == {trace}


def test_keys_prompts_and_answers_are_in_no_log(
    tmp_path: Path, log_files: LogFiles, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It tries success, refusals, faults of every layer that hold the words, and a disconnect."""
    bug = ValueError(f"cannot read {MARKER}")
    bug.__cause__ = KeyError(MARKER)
    scripted_app = ScriptedApp(tmp_path, SAYING, [bug], [EngineUnavailable()], [*SAYING[:1], bug], LEFT)
    statuses = [scripted_app.ask("POST", CHAT, BODY).status_code for _ in range(4)]
    scripted_app.leave(CHAT, BODY | {"stream": True}, after=b"Hel")
    for wrong in ({"temperature": MARKER}, {"model": MARKER}, {"messages": MARKER}):
        statuses.append(scripted_app.ask("POST", CHAT, BODY | wrong).status_code)
    statuses.append(scripted_app.ask("GET", f"/v1/{MARKER}").status_code)
    statuses.append(scripted_app.ask("GET", "/v1/models", authorization=f"Bearer bsk-{MARKER}").status_code)

    def broken(*_: object) -> None:
        pydantic.TypeAdapter(int).validate_python(f"{MARKER} {scripted_app.keys['acme']}")

    with monkeypatch.context() as patched:
        patched.setattr(scripted_app.gateway, "_quote", broken)  # an error that nobody expects, in the app
        statuses.append(scripted_app.ask("POST", CHAT, BODY).status_code)
    assert statuses == [200, 503, 503, 500, 400, 404, 400, 404, 401, 500]
    printed = capfd.readouterr()
    assert log_files.text.count('"level": "ERROR"') == 3
    assert "pydantic_core._pydantic_core.ValidationError (its message is not logged)" in log_files.text
    assert "caused by KeyError" in log_files.text
    for word in (MARKER, SAID, *scripted_app.keys.values()):
        for text in (log_files.text, printed.out, printed.err):
            assert word not in text


def test_what_libraries_say_of_values_is_left_out(log_files: LogFiles) -> None:
    async def forgotten() -> None:
        async def failing() -> None:
            raise RuntimeError(MARKER)

        asyncio.get_running_loop().call_soon(lambda word: 1 / 0, MARKER)
        task = asyncio.create_task(failing())
        await asyncio.wait({task})
        del task
        gc.collect()

    asyncio.run(forgotten())
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn(f"input_value='{MARKER}'", UserWarning, stacklevel=1)
    log.warning("not done yet: %s", RuntimeError(MARKER))
    log.error(InvalidRequest(MARKER))
    messages = [record["message"] for record in log_files.records]
    assert messages[:2] == [
        "Exception in callback test_what_libraries_say_of_values_is_left_out.",
        *messages[1:2],
    ]
    assert messages[1].startswith("Task exception was never retrieved")
    assert messages[2].endswith("UserWarning")
    assert "RuntimeError (its message is not logged)" in messages[3]
    assert len(messages) == 5
    assert MARKER not in log_files.text


@pytest.mark.parametrize(
    "text",
    [
        "key bsk-S3cret_part-1 is wrong",
        "platform key bsp-S3cret_part-1.",
        "{'authorization': 'Bearer S3cret_part-1'}",
        "[(b'authorization', b'Bearer S3cret_part-1')]",
        "Authorization: Basic S3cret_part-1",
        'x-api-key: "S3cret_part-1"',
        "{'api_key': 'S3cret_part-1', 'model': 'm'}",
        "cannot connect to postgresql://bespoke:S3cret_part-1@db.internal/bespoke",
    ],
)
def test_a_secret_in_a_message_or_a_field_is_redacted(log_files: LogFiles, text: str) -> None:
    log.warning("%s", text, extra={"model": text})
    log.exception("failed", exc_info=OSError(text))
    assert "[redacted]" in log_files.text
    assert "S3cret" not in log_files.text


def test_a_databases_error_says_what_is_wrong_and_not_with_which_row(
    store: Store, log_files: LogFiles
) -> None:
    def run(values: str) -> None:
        with store.write() as connection:
            connection.exec_driver_sql(
                "CREATE TEMPORARY TABLE kept (id INTEGER PRIMARY KEY, why TEXT NOT NULL, what TEXT)"
            )
            connection.exec_driver_sql("INSERT INTO kept VALUES (1, 'first', 'a row')")
            connection.execute(sa.text(f"INSERT INTO kept VALUES ({values})"), {"word": MARKER})

    for values in ("2, NULL, :word", "1, 'second', :word", "CAST(:word AS INTEGER), 'third', NULL"):
        try:
            run(values)
        except sa.exc.DBAPIError:
            log.exception("not kept")
    assert "IntegrityError: " in log_files.text
    assert MARKER not in log_files.text


def test_what_programs_say_is_kept(log_files: LogFiles) -> None:
    log.error("x", exc_info=OSError(28, "No space left on device", "/journals/a"))
    log.error("x", exc_info=AttributeError("'NoneType' object has no attribute 'price'"))
    exceptions = [record["exception"] for record in log_files.records]
    assert exceptions == [
        "OSError: [Errno 28] No space left on device: '/journals/a'",
        "AttributeError: 'NoneType' object has no attribute 'price'",
    ]


def test_a_traceback_names_its_frames(log_files: LogFiles) -> None:
    try:
        json.loads("{")
    except ValueError:
        log.exception("x")
    (record,) = log_files.records
    assert "in test_a_traceback_names_its_frames" in record["exception"]
    assert "decoder.py" in record["exception"]


def test_others_are_heard_from_warnings_on_and_we_from_the_level_that_is_set(directory: Path) -> None:
    with logging_to(directory, level="DEBUG"):
        for name in ("serve.x", "quantize.x", "httpx"):
            logging.getLogger(name).debug("debug")
            logging.getLogger(name).info("info")
        logging.getLogger("httpx").warning("warning")
    messages = [(record["logger"], record["message"]) for record in LogFiles(directory).records]
    ours = [(name, level) for name in ("serve.x", "quantize.x") for level in ("debug", "info")]
    assert messages == [*ours, ("httpx", "warning")]


def test_text_is_for_people(directory: Path) -> None:
    with logging_to(directory, form="text"):
        log.info("answered", extra={"route": CHAT, "status": 200, "unknown": "x"})
        log.error("failed", exc_info=OSError("away"))
    first, second, third = LogFiles(directory).text.splitlines()
    process = f"process=gateway pid={os.getpid()}"
    assert first.partition(" ")[2] == f"INFO serve.somewhere answered {process} route={CHAT} status=200"
    assert second.partition(" ")[2] == f"ERROR serve.somewhere failed {process}"
    assert third == "OSError: away"


def test_a_record_is_one_line_whatever_is_in_it(log_files: LogFiles) -> None:
    log.warning("first\nsecond\r\u2028\x00 %s", "x" * 100_000)
    assert len(log_files.text) < 6000
    assert json.loads(log_files.text)["message"].startswith("first\nsecond\r\u2028\x00 x")
    assert log_files.text.count("\n") == 1


def test_files_are_rotated_and_their_number_is_bounded(directory: Path) -> None:
    with logging_to(directory, file_bytes=4096, rotated_files=2):
        for number in range(200):
            log.info("record %d", number)
    files = [path for path in directory.iterdir() if ".log" in path.name]
    assert sorted(path.name for path in files) == ["gateway-0.log", "gateway-0.log.1", "gateway-0.log.2"]
    assert all(path.stat().st_size < 4096 + 512 for path in files)
    assert "record 199" in LogFiles(directory).text
    assert "record 0 " not in LogFiles(directory).text


PROCESS = """
import os, signal, sys
from serve.observability import logs
import logging
logs.install(logs.LogSpec(sys.argv[1]), "gateway")
logging.getLogger("serve.x").info("the last words")
print("ready", flush=True)
sys.stdin.readline()
os.kill(os.getpid(), signal.SIGKILL)
"""


def started(directory: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", PROCESS, str(directory)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def kill(process: "subprocess.Popen[str]") -> None:
    process.communicate("\n")
    assert process.returncode == -signal.SIGKILL


def test_processes_have_files_of_their_own_and_take_over_those_of_the_dead(directory: Path) -> None:
    first, second = started(directory), started(directory)
    assert LogFiles(directory).files == ["gateway-0", "gateway-1"]
    kill(first)
    third = started(directory)
    kill(second)
    kill(third)
    assert LogFiles(directory).files == ["gateway-0", "gateway-1"]
    records = [json.loads(line) for line in (directory / "gateway-0.log").read_text().splitlines()]
    assert [record["pid"] for record in records] == [first.pid, third.pid]
    assert {record["message"] for record in records} == {"the last words"}  # of two that were killed


def test_the_processes_that_vllm_starts_log_in_files_of_their_own(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CONFIGURE_LOGGING", "1")
    monkeypatch.setenv("BESPOKE_LOGS_OF_CHILDREN", "")
    with logging_to(directory):
        logs.install_with_children(logs.LogSpec(str(directory)), "engine-tiny")
        program = (
            "import logging; from serve import vllm_plugin; from serve.observability import logs;"
            " logs.install_as_child();"
            " logging.getLogger('vllm.core').error('EngineCore died')"
        )
        subprocess.run([sys.executable, "-c", program], check=True)
        assert os.environ["VLLM_CONFIGURE_LOGGING"] == "0"
    (record,) = LogFiles(directory).records
    assert (record["process"], record["message"]) == ("engine-tiny-vllm", "EngineCore died")


def test_a_process_that_nobody_told_logs_as_it_did(tmp_path: Path) -> None:
    before = list(logging.getLogger().handlers)
    logs.install_as_child({})
    assert logging.getLogger().handlers == before


def test_ray_serves_own_records_come_to_our_file_and_to_no_other(
    directory: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    ray = logging.getLogger("ray.serve")
    handlers, propagate = ray.handlers[:], ray.propagate
    ray.addHandler(logging.StreamHandler())
    ray.propagate = False
    try:
        with logging_to(directory):
            ray.error("Request failed.", exc_info=RuntimeError(MARKER))
    finally:
        ray.handlers[:], ray.propagate = handlers, propagate
    (record,) = LogFiles(directory).records
    assert record["exception"] == "RuntimeError (its message is not logged)"
    assert MARKER not in capfd.readouterr().err


def test_a_full_disk_fails_no_request_and_prints_no_secret(
    tmp_path: Path, directory: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "__stderr__", sys.stderr)
    with logging_to(directory) as file, monkeypatch.context() as patched:
        full = Path("/dev/full").open("w", encoding="utf-8")  # noqa: SIM115 # whose end fails, too
        patched.setattr(file, "stream", full)
        assert ScriptedApp(tmp_path, SAYING).ask("POST", CHAT, BODY).status_code == 200
        log.error("bsk-S3cret")
        with suppress(OSError):
            full.close()
    printed = capfd.readouterr().err
    assert "serve.observability.tracing is not logged: OSError: [Errno 28]" in printed
    assert "S3cret" not in printed
