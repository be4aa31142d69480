"""Compiles grammars in a process of its own, each in a child that the operating system limits.

A client's schema can ask for minutes, for gigabytes, or for a fault in the library. It costs its child then:
this process has everything loaded, forks one child after another, and tells what became of it.
Lines of JSON come in and go out: first the tokenizer's description, answered by `{}`, then one job at a
time. The end of the input is the end of the replica, and of this process.
"""

import gc
import json
import os
import resource
import select
import signal
import sys
import time
from pathlib import Path
from typing import Any

CPU_S_MAX = 3
MEMORY_BYTES_MAX = 512 * 1024 * 1024  # above what the process holds before
# A machine without a free core may need longer for 3 s of CPU; the gateway waits 20 s for a replica.
WALL_S_MAX = 15.0
NICENESS = 5

Json = dict[str, Any]


def main() -> None:
    replies = os.dup(1)
    os.dup2(2, 1)  # what a library prints is no reply
    import xgrammar

    tokenizer = sys.stdin.buffer.readline()
    if not tokenizer:
        return
    info = xgrammar.TokenizerInfo.deserialize_json(json.loads(tokenizer))
    gc.freeze()
    _reply(replies, {})
    while line := sys.stdin.buffer.readline():
        _reply(replies, _in_child(json.loads(line), info))


def _reply(replies: int, reply: Json) -> None:
    os.write(replies, json.dumps(reply).encode() + b"\n")


def _in_child(job: Json, info: Any) -> Json:
    """Returns the child's answer, or what ended it. Adds the seconds of CPU that it took."""
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        _be_child(job, info, writing)
    os.close(writing)
    answer, starved = _answer(reading, pid)
    os.close(reading)
    _, status, usage = os.wait4(pid, 0)
    reply: Json = {"cpu_s": usage.ru_utime + usage.ru_stime}
    if starved:
        return reply | {"starved": True}
    if status or not answer:
        return reply | {"killed": status}
    return reply | dict(json.loads(answer))


def _answer(reading: int, pid: int) -> tuple[bytes, bool]:
    """Reads until the child ends. Kills a child that starves, or whose replica is gone."""
    answer, deadline_s = b"", time.monotonic() + WALL_S_MAX
    while True:
        ready, _, _ = select.select([reading, 0], [], [], max(0.0, deadline_s - time.monotonic()))
        if reading in ready:
            if not (part := os.read(reading, 65536)):
                return answer, False
            answer += part
            continue
        os.kill(pid, signal.SIGKILL)
        if ready:  # no second job comes before the first is answered
            os._exit(0)
        return answer, True


def _be_child(job: Json, info: Any, writing: int) -> None:
    """Never returns."""
    try:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)  # the library's warnings quote schemas
        os.nice(NICENESS)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_S_MAX, CPU_S_MAX + 1))
        held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY_BYTES_MAX, held + MEMORY_BYTES_MAX))
        os.write(writing, json.dumps(compile_grammar(job, info)).encode())
        os._exit(0)
    finally:
        os._exit(1)


def compile_grammar(job: Json, info: Any) -> Json:
    """Compiles as vLLM's core does. Returns the grammar's bytes, or the error and which schema has it."""
    import xgrammar

    schemas, checked = job["schemas"], 0
    try:
        for schema in schemas:
            xgrammar.Grammar.from_json_schema(schema)
            checked += 1
        compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
        return {"bytes": _compiled(compiler, job["kind"], job["text"]).memory_size_bytes}
    except Exception as error:  # of several types, from C++
        if isinstance(error, MemoryError) or "bad_alloc" in str(error):
            return {"too_large": True}
        named = checked if checked < len(schemas) else None
        return {"error": str(error) or type(error).__name__, "schema": named}


def _compiled(compiler: Any, kind: str, text: str) -> Any:
    """See `XgrammarBackend.compile_grammar` in vLLM 0.32 (v1/structured_output/backend_xgrammar.py)."""
    import xgrammar

    if kind in ("json", "json_object"):
        schema = text if kind == "json" else '{"type": "object"}'
        return compiler.compile_json_schema(schema, any_whitespace=False, separators=(",", ":"))
    if kind == "regex":
        return compiler.compile_regex(text)
    if kind == "grammar":
        return compiler.compile_grammar(text)
    tag = json.loads(text)
    if "structures" not in tag:
        return compiler.compile_structural_tag(text)
    items = [
        xgrammar.StructuralTagItem(begin=each["begin"], schema=json.dumps(each["schema"]), end=each["end"])
        for each in tag["structures"]
    ]
    return compiler.compile_structural_tag(items, tag["triggers"])


if __name__ == "__main__":
    main()
