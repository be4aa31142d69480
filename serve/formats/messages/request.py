"""Parses the body of `POST /v1/messages` — docs.anthropic.com/en/api/messages.

The rules are those of `serve.formats.sampling`: unknown fields are ignored, and a field that would change the
answer but is not implemented is refused by name. Reference: `anthropic.types.MessageCreateParams`.
"""

import json
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Discriminator, Field, Tag, field_validator, model_validator

from serve.engine.protocol import JsonFormat, Message, Sampling, Tool, Toolbox, ToolCall
from serve.errors import InvalidRequest
from serve.formats.body_budget import FreeObject, Items
from serve.formats.bounds import bound, check_tools, clamped, schema_text
from serve.formats.chat import CallId
from serve.formats.sampling import RequestBounds, TopP, refuse, top_p_of
from serve.formats.schema_budget import Schema, check_schemas
from serve.inference.request import InferenceRequest

ToolName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,128}$")]

FORMAT_SCHEMA = "output_config.format.schema"

# Anthropic's fields that are not implemented, each with the values that change nothing.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "container": (),
    "context_management": (),
    "mcp_servers": ([],),
}


class TextBlock(BaseModel):
    type: Literal["text"] = "text"
    text: str


class ToolUseBlock(BaseModel):
    type: Literal["tool_use"]
    id: CallId
    name: ToolName
    input: FreeObject


class ToolResultBlock(BaseModel):
    type: Literal["tool_result"]
    tool_use_id: CallId
    content: str | Items[TextBlock] | None = None

    @property
    def text(self) -> str:
        return _text(self.content or "")


class ThinkingBlock(BaseModel):
    """An earlier answer's thinking that the client sends back. No chat template takes it."""

    type: Literal["thinking", "redacted_thinking"]


# In capitals, because `sampling.parse` leaves such names out of the path of a wrong field.
_TAGS = {
    "text": "TextBlock",
    "tool_use": "ToolUseBlock",
    "tool_result": "ToolResultBlock",
    "thinking": "ThinkingBlock",
    "redacted_thinking": "ThinkingBlock",
}


def _tag(block: Any) -> str:
    kind = block.get("type", "text") if isinstance(block, dict) else "text"
    if not isinstance(kind, str) or kind not in _TAGS:
        raise _unsupported("messages", f"content blocks of the type '{str(kind)[:64]}' are not taken")
    return _TAGS[kind]


Block = Annotated[
    Annotated[TextBlock, Tag("TextBlock")]
    | Annotated[ToolUseBlock, Tag("ToolUseBlock")]
    | Annotated[ToolResultBlock, Tag("ToolResultBlock")]
    | Annotated[ThinkingBlock, Tag("ThinkingBlock")],
    Discriminator(_tag),
]


class AnthropicTurn(BaseModel):
    role: Literal["user", "assistant", "system"]
    content: str | Items[Block]

    def messages(self) -> Iterator[Message]:
        """The turn in the engine's terms: a tool's result is its own message; a call joins its text."""
        text: str | None = None
        calls: list[ToolCall] = []
        blocks = [TextBlock(text=self.content)] if isinstance(self.content, str) else self.content
        for block in blocks:
            if isinstance(block, TextBlock):
                text = (text or "") + block.text
            elif isinstance(block, ToolUseBlock):
                calls.append(ToolCall(len(calls), block.id, block.name, json.dumps(block.input)))
            elif isinstance(block, ToolResultBlock):
                if text is not None:
                    yield Message(self.role, text)
                    text = None
                yield Message("tool", block.text, tool_call_id=block.tool_use_id)
        if text is not None or calls:
            yield Message(self.role, text, tuple(calls))

    @model_validator(mode="after")
    def _blocks_of_its_role(self) -> "AnthropicTurn":
        for block in self.content if isinstance(self.content, list) else ():
            if isinstance(block, ToolUseBlock) and self.role != "assistant":
                raise ValueError("only an assistant's message may hold tool_use")
            if isinstance(block, ToolResultBlock) and self.role != "user":
                raise ValueError("only a user's message may hold tool_result")
        return self


class AnthropicTool(BaseModel):
    type: Literal["custom"] | None = None
    name: ToolName
    description: str | None = None
    input_schema: FreeObject
    strict: bool | None = None


class AnthropicToolChoice(BaseModel):
    type: Literal["auto", "any", "tool", "none"]
    name: ToolName | None = None
    disable_parallel_tool_use: bool = False

    @model_validator(mode="after")
    def _named(self) -> "AnthropicToolChoice":
        if self.type == "tool" and self.name is None:
            raise ValueError("the type tool needs a name")
        return self


class Thinking(BaseModel):
    # "adaptive" leaves the decision to the model.
    type: Literal["disabled", "adaptive"]


class OutputFormat(BaseModel):
    type: Literal["json_schema"]
    # Not called `schema`, which pydantic's models have already.
    document: FreeObject = Field(alias="schema")


class OutputConfig(BaseModel):
    format: OutputFormat | None = None
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None


class MessagesPrompt(BaseModel):
    """The body of `POST /v1/messages/count_tokens`: a message's, whose length need not be bounded."""

    model: str = Field(min_length=1, max_length=160)
    messages: Items[AnthropicTurn] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    system: str | Items[TextBlock] | None = None
    stop_sequences: Items[Annotated[str, Field(min_length=1, max_length=256)]] | None = None
    temperature: Annotated[float, Field(ge=0, le=1)] | None = None
    top_p: TopP | None = None
    top_k: int | None = Field(None, ge=0, le=2**31 - 1)
    tools: Items[AnthropicTool] | None = None
    tool_choice: AnthropicToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    stream: bool | None = False

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        refuse(data)
        for name in sorted(data.keys() & UNSUPPORTED.keys()):
            if data[name] is not None and data[name] not in UNSUPPORTED[name]:
                raise _unsupported(name, "not with this value")
        tools = data.get("tools")
        for index, tool in enumerate(tools if isinstance(tools, list) else ()):
            kind = tool.get("type") if isinstance(tool, dict) else None
            if kind not in (None, "custom"):
                raise _unsupported(
                    f"tools.{index}.type", f"tools of the type '{str(kind)[:64]}' are not taken"
                )
        return data

    @field_validator("messages")
    @classmethod
    def _answerable(cls, messages: list[AnthropicTurn]) -> list[AnthropicTurn]:
        if messages[-1].role == "assistant":
            raise ValueError("the last message is the assistant's, whose words cannot be put into its mouth")
        return messages

    @model_validator(mode="after")
    def _consistent(self) -> "MessagesPrompt":
        choice = self.tool_choice
        named = (choice.name or "") if choice is not None and choice.type == "tool" else None
        names = [tool.name for tool in self.tools or ()]
        check_tools(names, forced=choice is not None and choice.type == "any", function=named)
        check_schemas([*self._schemas()])
        return self

    def _schemas(self) -> Iterator[Schema]:
        answer = self.output_config.format if self.output_config else None
        if answer is not None:
            yield Schema(FORMAT_SCHEMA, answer.document)
        for index, tool in enumerate(self.tools or ()):
            yield Schema(f"tools.{index}.input_schema", tool.input_schema, tool.name, tool.strict is True)

    def prompt(self, limits: RequestBounds) -> tuple[Message, ...]:
        """The messages in the engine's terms.

        Raises InvalidRequest if there are too many, or a tool_result belongs to no earlier tool_use.
        """
        system = [] if self.system is None else [Message("system", _text(self.system))]
        messages = [*system, *(message for turn in self.messages for message in turn.messages())]
        bound("messages", len(messages), limits.messages, "messages, each tool_result counted as one")
        call_ids: set[str | None] = set()
        for message in messages:
            call_ids |= {call.id for call in message.tool_calls}
            if message.role == "tool" and message.tool_call_id not in call_ids:
                raise InvalidRequest(
                    f"There is no tool_use '{message.tool_call_id}' for this tool_result.", "messages"
                )
        return tuple(messages)

    def toolbox(self, limits: RequestBounds) -> Toolbox | None:
        if not self.tools:
            return None
        bound("tools", len(self.tools), limits.tools, "tools")
        tools = tuple(
            Tool(
                tool.name,
                tool.description,
                schema_text(tool.input_schema),
                tool.strict,
                f"tools.{index}.input_schema",
            )
            for index, tool in enumerate(self.tools)
        )
        choice = self.tool_choice or AnthropicToolChoice(type="auto")
        kind = {"any": "required", "tool": "required"}.get(choice.type, choice.type)
        name = choice.name if choice.type == "tool" else None
        return Toolbox(tools, kind, name, not choice.disable_parallel_tool_use)

    def sampling(self, limits: RequestBounds) -> Sampling:
        stop = tuple(self.stop_sequences or ())
        bound("stop_sequences", len(stop), limits.stop_sequences, "stop sequences")
        output = self.output_config.format if self.output_config else None
        return Sampling(
            completion_tokens_max=clamped(self.max_tokens, limits.completion_tokens),
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=top_p_of(self.top_p),
            top_k=self.top_k or 0,
            stop=stop,
            format=JsonFormat(schema_text(output.document), FORMAT_SCHEMA) if output else None,
        )

    @property
    def reasoning_effort(self) -> str | None:
        """The effort in OpenAI's words, which the chat templates know."""
        effort = self.output_config.effort if self.output_config else None
        return "xhigh" if effort == "max" else effort


class MessagesRequest(MessagesPrompt):
    max_tokens: int = Field(ge=1)


def request_of(body: MessagesPrompt, request_id: str, limits: RequestBounds) -> InferenceRequest:
    """The body in the gateway's terms. Raises InvalidRequest beyond the installation's bounds."""
    return InferenceRequest(
        request_id=request_id,
        model=body.model,
        prompt=body.prompt(limits),
        sampling=body.sampling(limits),
        toolbox=body.toolbox(limits),
        reasoning_effort=body.reasoning_effort,
        collect=not body.stream,
        completion_tokens_asked=body.max_tokens,
    )


def _text(content: str | list[TextBlock]) -> str:
    return content if isinstance(content, str) else "".join(block.text for block in content)


def _unsupported(param: str, why: str) -> InvalidRequest:
    return InvalidRequest(f"'{param}' is not supported: {why}.", param, "unsupported_parameter")
