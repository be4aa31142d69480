"""Translates the Responses API's tools: what the model is offered, and how its calls are named to the client.

A model calls functions. A `custom` tool, which takes free text, is offered as a function with the one text
`input`. A namespace's tools are offered one by one, as `namespace__tool`. Tools that OpenAI runs itself, or
that only its own models know, are left out; the route tells which.
Reference: `openai.types.responses.Tool`.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, Discriminator, Field, Tag
from pydantic_core import from_json

from serve.engine.protocol import Tool
from serve.errors import InvalidRequest
from serve.formats.bounds import schema_text
from serve.formats.chat import FunctionName, OfferedFunction

TOOLS_OF_A_NAMESPACE_MAX = 128
CUSTOM_SCHEMA = {
    "type": "object",
    "properties": {"input": {"type": "string"}},
    "required": ["input"],
    "additionalProperties": False,
}

HostedType = Literal[
    "apply_patch",
    "code_interpreter",
    "computer",
    "computer_use_preview",
    "file_search",
    "image_generation",
    "local_shell",
    "mcp",
    "programmatic_tool_calling",
    "shell",
    "tool_search",
    "web_search",
    "web_search_2025_08_26",
    "web_search_preview",
    "web_search_preview_2025_03_11",
]
HOSTED: tuple[str, ...] = get_args(HostedType)


class FunctionTool(OfferedFunction):
    type: Literal["function"]


class CustomFormat(BaseModel):
    type: Literal["text", "grammar"]
    syntax: Literal["lark", "regex"] | None = None
    definition: str | None = None


class CustomTool(BaseModel):
    type: Literal["custom"]
    name: FunctionName
    description: str | None = None
    format: CustomFormat | None = None


class HostedTool(BaseModel):
    """A tool that is not run here. It is left out, unless the model must call it."""

    type: HostedType


_INNER_TAGS = {"function": "FunctionTool", "custom": "CustomTool"}
# In capitals, because `sampling.parse` leaves such names out of the path of a wrong field.
_TAGS = _INNER_TAGS | {"namespace": "NamespaceTool"} | dict.fromkeys(HOSTED, "HostedTool")


def tag_of(tool: Any, param: str = "tools", tags: dict[str, str] = _TAGS) -> str:
    """The name of the tool's model. Raises InvalidRequest for a type that does not exist."""
    kind = tool.get("type", "function") if isinstance(tool, dict) else "function"
    if not isinstance(kind, str) or kind not in tags:
        raise InvalidRequest(
            f"Tools of the type '{str(kind)[:64]}' are not supported.", param, "unsupported_parameter"
        )
    return tags[kind]


def _inner_tag(tool: Any) -> str:
    return tag_of(tool, tags=_INNER_TAGS)


InnerTool = Annotated[
    Annotated[FunctionTool, Tag("FunctionTool")] | Annotated[CustomTool, Tag("CustomTool")],
    Discriminator(_inner_tag),
]


class NamespaceTool(BaseModel):
    type: Literal["namespace"]
    name: FunctionName
    description: str | None = None
    tools: Annotated[list[InnerTool], Field(max_length=TOOLS_OF_A_NAMESPACE_MAX, fail_fast=True)]


ResponsesTool = Annotated[
    Annotated[FunctionTool, Tag("FunctionTool")]
    | Annotated[CustomTool, Tag("CustomTool")]
    | Annotated[NamespaceTool, Tag("NamespaceTool")]
    | Annotated[HostedTool, Tag("HostedTool")],
    Discriminator(tag_of),
]


@dataclass(frozen=True, slots=True)
class Offer:
    """Holds one tool that the model is offered. `param` is its place in the body."""

    tool: FunctionTool | CustomTool
    param: str
    namespace: str | None = None

    @property
    def name(self) -> str:
        """The name that the model knows."""
        return model_name(self.tool.name, self.namespace)

    @property
    def schema_param(self) -> str:
        return f"{self.param}.parameters"

    def engine_tool(self) -> Tool:
        tool = self.tool
        if isinstance(tool, CustomTool):
            return Tool(self.name, _custom_description(tool), schema_text(CUSTOM_SCHEMA), None, self.param)
        parameters = None if tool.parameters is None else schema_text(tool.parameters)
        return Tool(self.name, tool.description, parameters, tool.strict, self.schema_param)


def offers(tools: Sequence[ResponsesTool]) -> Iterator[Offer]:
    """The tools that the model is offered, those of namespaces one by one."""
    for index, tool in enumerate(tools):
        if isinstance(tool, NamespaceTool):
            for inner, part in enumerate(tool.tools):
                yield Offer(part, f"tools.{index}.tools.{inner}", tool.name)
        elif not isinstance(tool, HostedTool):
            yield Offer(tool, f"tools.{index}")


def ignored(tools: Sequence[ResponsesTool]) -> list[str]:
    """The types of the tools that the model is not offered, each once."""
    return list(dict.fromkeys(tool.type for tool in tools if isinstance(tool, HostedTool)))


def model_name(name: str, namespace: str | None) -> str:
    """A tool's name as the model knows it."""
    return name if namespace is None else f"{namespace.removesuffix('__')}__{name}"


def custom_arguments(text: str) -> str:
    """The arguments of the function that stands for a custom tool."""
    return json.dumps({"input": text}, ensure_ascii=False)


def custom_input(arguments: str) -> str:
    """The text in these arguments, also if they were cut short. What is no such object is the text itself."""
    try:
        parsed = from_json(arguments or "{}", allow_partial="trailing-strings")
    except ValueError:
        return arguments
    if not isinstance(parsed, dict):
        return arguments
    text = parsed.get("input") if parsed else ""
    return text if isinstance(text, str) else arguments


def _custom_description(tool: CustomTool) -> str | None:
    """A grammar cannot be held within JSON, so that the model is told it instead."""
    if tool.format is None or tool.format.definition is None:
        return tool.description
    syntax = tool.format.syntax or "lark"
    grammar = f"The input follows this grammar ({syntax}):\n{tool.format.definition}"
    return f"{tool.description or ''}\n{grammar}".strip()
