"""Chooses one grammar library for an engine, and refuses schemas that give no grammar.

vLLM validates schemas too, but all tools of a request at once: its refusal names none of them.
"""

import re

from serve.engine.protocol import GenerationRequest
from serve.errors import InvalidRequest

# Left to vLLM (`auto`), the first request that needs a grammar chooses the library for all. xgrammar is the
# only one that knows the tags of tool calls; vLLM's guidance fails on them.
GRAMMAR_BACKEND = "xgrammar"
_REASON_CHARS_MAX = 300
# xgrammar's errors begin with a time, its source's place and the check that failed.
_PREFIX = re.compile(
    r"^\s*(?:\[[\d:]+\]\s*)?\S*\.(?:cc|h):\d+:\s*(?:Check failed: \(.*?\) is false:\s*)?", re.DOTALL
)


def check_grammars(request: GenerationRequest) -> None:
    """Raises InvalidRequest for a schema that gives no grammar. They are small: a millisecond each."""
    answer = request.sampling.format
    if answer is not None and answer.schema is not None:
        _check(answer.schema, answer.param or "response_format", None)
    toolbox = request.toolbox
    if toolbox is None or toolbox.choice == "none":
        return
    for tool in toolbox.tools:
        if tool.parameters is not None and tool.strict is not False:
            _check(tool.parameters, tool.param or "tools", tool.name)


def _check(schema: str, param: str, tool: str | None) -> None:
    import xgrammar

    try:
        xgrammar.Grammar.from_json_schema(schema)
    except Exception as error:  # of several types, from C++
        whose = "" if tool is None else f" of the tool '{tool}'"
        text = f"'{param}'{whose} cannot be made a grammar: {_reason(error)}"
        raise InvalidRequest(text, param, "invalid_value") from error


def _reason(error: Exception) -> str:
    text = _PREFIX.sub("", str(error)).strip().split("\n")[0]
    return (text or type(error).__name__)[:_REASON_CHARS_MAX]
