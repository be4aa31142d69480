"""Holds the process that compiles a replica's grammars, and replaces it when it fails (`grammar_worker`)."""

import contextlib
import json
import os
import select
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from typing import Any

from serve.engine.vllm.grammar_worker import WALL_S_MAX

_START_S_MAX = 120.0  # it imports torch, with xgrammar
_REPLY_S_MAX = WALL_S_MAX + 15.0


@dataclass(frozen=True, slots=True)
class Grammar:
    """Describes a grammar as vLLM's core compiles it: a kind, and a text of this kind.

    `schemas` are the JSON Schemas within, each for itself, so that an error can name one.
    """

    kind: str
    text: str
    schemas: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Verdict:
    """Says what became of a grammar: it compiles, holds an error (of schema number `schema`), or is too much.

    `bytes` is how much memory it takes, `cpu_s` how long it took.
    """

    error: str | None = None
    schema: int | None = None
    too_complex: bool = False
    bytes: int = 0
    cpu_s: float = 0.0

    @property
    def allowed(self) -> bool:
        return self.error is None and not self.too_complex


class GrammarProcessFailed(Exception):
    """The process gave no verdict: it has died, or the machine had no time for it."""


class GrammarProcess:
    """Compiles one grammar at a time. Its methods block; only `close` may be called from another thread."""

    def __init__(self) -> None:
        self.tokenizer = ""  # xgrammar's description of it, as JSON
        self._process: subprocess.Popen[bytes] | None = None
        self._ready = False
        self._lock = threading.Lock()
        self._closed = False

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def compile(self, grammar: Grammar) -> Verdict:
        """Returns the verdict. Raises GrammarProcessFailed."""
        job = {"kind": grammar.kind, "text": grammar.text, "schemas": grammar.schemas}
        try:
            reply = self._ask(self._started(), job, _REPLY_S_MAX)
        except (OSError, ValueError) as error:
            self._end()
            raise GrammarProcessFailed() from error
        if reply.get("starved"):
            raise GrammarProcessFailed()
        too_complex = "killed" in reply or "too_large" in reply
        return Verdict(
            reply.get("error"), reply.get("schema"), too_complex, reply.get("bytes", 0), reply["cpu_s"]
        )

    def _started(self) -> "subprocess.Popen[bytes]":
        process = self._process
        if process is None or process.poll() is not None:
            process = self.start()
        if not self._ready:
            self._ask(process, self.tokenizer, _START_S_MAX)
            self._ready = True
        return process

    def start(self) -> "subprocess.Popen[bytes]":
        """Starts the process, which takes seconds to load the library. Does not wait for it."""
        self._end()
        with self._lock:
            if self._closed:
                raise GrammarProcessFailed()
            self._process = subprocess.Popen(
                [sys.executable, "-m", "serve.engine.vllm.grammar_worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,  # a terminal's Ctrl-C is for the replica
                env=os.environ
                | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
            return self._process

    def _ask(self, process: "subprocess.Popen[bytes]", question: Any, seconds_max: float) -> dict[str, Any]:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(question).encode() + b"\n")
        process.stdin.flush()
        reply, deadline_s = b"", time.monotonic() + seconds_max
        while not reply.endswith(b"\n"):
            left_s = max(0.0, deadline_s - time.monotonic())
            if not select.select([process.stdout], [], [], left_s)[0]:
                raise TimeoutError()
            if not (part := os.read(process.stdout.fileno(), 65536)):
                raise BrokenPipeError()
            reply += part
        return dict(json.loads(reply))

    def _end(self) -> None:
        process, self._process, self._ready = self._process, None, False
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):  # what was not yet written goes nowhere
                    pipe.close()

    def close(self) -> None:
        """Ends the process; a compilation in progress fails."""
        with self._lock:
            self._closed = True
            process = self._process
        if process is not None:
            process.kill()
            process.wait()
