"""Chooses one grammar library for an engine, and refuses what gives no grammar or one that is too much.

vLLM validates schemas too, but in the replica's event loop and all tools of a request at once: its refusal
names none of them. The gate does it in a process of its own (`grammar_gate`).
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from serve.engine.protocol import GenerationRequest
from serve.engine.vllm import upstream
from serve.engine.vllm.grammar_gate import GrammarGate, VerdictCache
from serve.engine.vllm.grammar_process import Grammar, GrammarProcess
from serve.errors import InvalidRequest

# Left to vLLM (`auto`), the first request that needs a grammar chooses the library for all. xgrammar is the
# only one that knows the tags of tool calls; vLLM's guidance fails on them.
GRAMMAR_BACKEND = "xgrammar"
# vLLM's core forgets the grammars that were not used for longest. The gate forgets earlier: what it knows
# costs the core nothing.
CORE_CACHE_MB = 256
_KNOWN_BYTES_MAX = CORE_CACHE_MB * 1024 * 1024 // 2
_REASON_CHARS_MAX = 300
# xgrammar's errors begin with a time, its source's place and the check that failed.
_PREFIX = re.compile(
    r"^\s*(?:\[[\d:]+\]\s*)?\S*\.(?:cc|h):\d+:\s*(?:Check failed: \(.*?\) is false:\s*)?", re.DOTALL
)

_Named = tuple[str, str, str | None]  # a schema, the client's name for its place, its tool


def make_gate(process: GrammarProcess, llm: Any) -> GrammarGate:
    """Makes the gate of an engine around `process`, which may be starting."""
    process.tokenizer = upstream.grammar_tokenizer(llm)
    return GrammarGate(process, VerdictCache(_KNOWN_BYTES_MAX))


async def check_grammar(gate: GrammarGate, request: GenerationRequest, params: Sequence[Any]) -> None:
    """Waits for the gate's verdict on the request's grammar, if it needs one. `params` are vLLM's.

    Raises InvalidRequest, RateLimited, EngineUnavailable.
    """
    if (described := upstream.grammar_of(params[0])) is None:
        return
    named = list(_schemas(request))
    grammar = Grammar(*described, tuple(schema for schema, _, _ in named))
    verdict = await gate.verdict(request.cache_salt, grammar)
    if verdict.allowed:
        return
    _, param, tool = _one_of(request, named, verdict.schema)
    whose = "" if tool is None else f" of the tool '{tool}'"
    if verdict.too_complex:
        text = f"'{param}'{whose} is too complex: its grammar takes too much time or memory to compile."
        raise InvalidRequest(text, param, "schema_too_complex")
    text = f"'{param}'{whose} cannot be made a grammar: {_reason(verdict.error or '')}"
    raise InvalidRequest(text, param, "invalid_value")


def _schemas(request: GenerationRequest) -> Iterator[_Named]:
    answer, toolbox = request.sampling.format, request.toolbox
    if answer is not None and answer.schema is not None:
        yield answer.schema, answer.param or "response_format", None
    if toolbox is not None and toolbox.choice != "none":
        for tool in toolbox.tools:
            if tool.parameters is not None and tool.strict is not False:
                yield tool.parameters, tool.param or "tools", tool.name


def _one_of(request: GenerationRequest, named: list[_Named], index: int | None) -> _Named:
    """The schema that a verdict is about. All of them together are called by the field that holds them."""
    if (text := request.sampling.text_format) is not None:
        return "", text.param, None
    if index is not None:
        return named[index]
    if len(named) == 1:
        return named[0]
    return ("", "tools", None) if named else ("", "response_format", None)


def _reason(error: str) -> str:
    text = _PREFIX.sub("", error).strip().split("\n")[0]
    return (text or "the grammar library refuses it")[:_REASON_CHARS_MAX]
