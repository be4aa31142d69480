"""A grammar costs its own child process: its time and memory are bounded, and no fault reaches a replica."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from serve.engine.vllm.grammar_process import Grammar, GrammarProcess, GrammarProcessFailed

xgrammar = pytest.importorskip("xgrammar")

SMALL = {"type": "object", "properties": {"k": {"type": "string", "maxLength": 3}}, "required": ["k"]}
# Half a minute of a fast processor.
ENDLESS = {
    "type": "object",
    "properties": {f"k{n}": {"type": "string", "format": "uri"} for n in range(5000)},
}


@pytest.fixture(scope="module")
def tokenizer() -> str:
    letters = [chr(code) for code in range(32, 127)]
    return str(xgrammar.TokenizerInfo([*letters, "</s>"], stop_token_ids=[len(letters)]).serialize_json())


@pytest.fixture(scope="module")
def process(tokenizer: str) -> Iterator[GrammarProcess]:
    process = GrammarProcess()
    process.tokenizer = tokenizer
    yield process
    process.close()


def bush(depth: int) -> dict[str, Any]:
    """A schema of 12 properties, each of 12 properties: gigabytes at a depth of five."""
    if not depth:
        return {"type": "string"}
    return {"type": "object", "properties": {f"k{number}": bush(depth - 1) for number in range(12)}}


def grammar(schema: dict[str, Any], *named: dict[str, Any]) -> Grammar:
    return Grammar("json", json.dumps(schema), tuple(json.dumps(each) for each in named or (schema,)))


def test_a_grammar_that_compiles_is_allowed_with_its_size(process: GrammarProcess) -> None:
    verdict = process.compile(grammar(SMALL))
    assert verdict.allowed
    assert verdict.bytes > 0


@pytest.mark.parametrize("kind", ["json_object", "regex", "grammar", "structural_tag"])
def test_every_kind_that_vllm_compiles_is_compiled(process: GrammarProcess, kind: str) -> None:
    content = {"type": "json_schema", "json_schema": SMALL}
    format = {"type": "tag", "begin": "<t>", "content": content, "end": "</t>"}
    text = {
        "json_object": "",
        "regex": "[a-z]+",
        "grammar": 'root ::= "a" | "b"',
        "structural_tag": json.dumps({"type": "structural_tag", "format": format}),
    }
    assert process.compile(Grammar(kind, text[kind])).allowed


def test_an_error_names_the_schema_that_has_it(process: GrammarProcess) -> None:
    wrong = {"type": "string", "minLength": 3, "maxLength": 2}
    verdict = process.compile(grammar(SMALL, SMALL, wrong, SMALL))
    assert verdict.schema == 1
    assert "minLength 3 is greater than maxLength 2" in (verdict.error or "")
    whole = process.compile(Grammar("structural_tag", "{}", (json.dumps(SMALL),)))
    assert whole.schema is None
    assert whole.error is not None


@pytest.mark.parametrize("schema", [ENDLESS, bush(5)], ids=["time", "memory"])
def test_what_asks_for_too_much_ends_its_child_and_not_the_process(
    process: GrammarProcess, schema: dict[str, Any]
) -> None:
    assert process.compile(grammar(SMALL)).allowed
    pid = process.pid
    verdict = process.compile(grammar(schema))
    assert verdict.too_complex
    assert not verdict.allowed
    assert process.compile(grammar(SMALL)).allowed
    assert process.pid == pid


def test_a_process_that_died_is_replaced(process: GrammarProcess) -> None:
    assert process.compile(grammar(SMALL)).allowed
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    for _ in range(2):  # the first may find the broken pipe
        try:
            verdict = process.compile(grammar(SMALL))
            break
        except GrammarProcessFailed:
            continue
    assert verdict.allowed


def test_the_process_ends_with_its_replica(tokenizer: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer").write_text(tokenizer)
    replica = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, time\n"
            "from serve.engine.vllm.grammar_process import Grammar, GrammarProcess\n"
            "process = GrammarProcess()\n"
            "process.tokenizer = open(sys.argv[1]).read()\n"
            "assert process.compile(Grammar('json_object', '')).allowed\n"
            "print(process.pid, flush=True)\n"
            "time.sleep(600)\n",
            str(tmp_path / "tokenizer"),
        ],
        stdout=subprocess.PIPE,
    )
    assert replica.stdout is not None
    worker = psutil.Process(int(replica.stdout.readline()))
    replica.kill()
    replica.wait()
    replica.stdout.close()
    worker.wait(timeout=30)
