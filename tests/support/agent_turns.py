"""Holds request bodies as agents send them: what Codex and Claude Code put around one user's words.

Written by hand after the public shapes of the two APIs; the texts are ours.
"""

from typing import Any

Json = dict[str, Any]

SHELL: Json = {
    "type": "function",
    "name": "shell",
    "description": "Runs a command and returns its output.",
    "strict": False,
    "parameters": {
        "type": "object",
        "properties": {
            "command": {"type": "array", "items": {"type": "string"}},
            "workdir": {"type": "string"},
            "timeout_ms": {"type": "number"},
        },
        "required": ["command"],
        "additionalProperties": False,
    },
}
APPLY_PATCH: Json = {
    "type": "custom",
    "name": "apply_patch",
    "description": "Edits files.",
    "format": {"type": "grammar", "syntax": "lark", "definition": 'start: "*** Begin Patch" LF\nLF: "\\n"'},
}
GITHUB: Json = {
    "type": "namespace",
    "name": "mcp__github__",
    "description": "Reads repositories.",
    "tools": [
        {
            "type": "function",
            "name": "search_issues",
            "description": "Finds issues.",
            "strict": False,
            "parameters": {"type": "object", "properties": {"query": {"type": "string"}}},
        }
    ],
}
HOSTED: list[Json] = [{"type": "web_search", "external_web_access": True}, {"type": "local_shell"}]


def codex_turn(model: str, words: str, **fields: Any) -> Json:
    """The body of one turn of Codex, which keeps its history itself."""
    said = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": words}]}
    rules = {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "Be brief."}]}
    return {
        "model": model,
        "instructions": "You are a coding agent.",
        "input": [rules, said],
        "tools": [SHELL, APPLY_PATCH, GITHUB, *HOSTED],
        "tool_choice": "auto",
        "parallel_tool_calls": False,
        "reasoning": {"effort": "medium", "summary": "auto"},
        "store": False,
        "stream": True,
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "0199",
        "client_metadata": {"x-codex-installation-id": "1"},
    } | fields


def claude_code_turn(model: str, words: str, **fields: Any) -> Json:
    """The body of one turn of Claude Code."""
    cached = {"cache_control": {"type": "ephemeral"}}
    return {
        "model": model,
        "max_tokens": 32_000,
        "system": [
            {"type": "text", "text": "You are a coding agent."} | cached,
            {"type": "text", "text": "Answer in one line."} | cached,
        ],
        "messages": [{"role": "user", "content": [{"type": "text", "text": words} | cached]}],
        "tools": [
            {
                "name": "Bash",
                "description": "Runs a command.",
                "input_schema": {
                    "$schema": "http://json-schema.org/draft-07/schema#",
                    "type": "object",
                    "properties": {"command": {"type": "string"}, "timeout": {"type": "number"}},
                    "required": ["command"],
                    "additionalProperties": False,
                },
            }
        ],
        "metadata": {"user_id": "user_1_account__session_1"},
        "temperature": 1,
        "stream": True,
    } | fields
