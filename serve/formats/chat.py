"""Translates chat: the body into an InferenceRequest, the answer into chat.completion objects.

platform.openai.com/docs/api-reference/chat. Fixed bounds are part of the field types; bounds that depend on
the installation are checked by `request_of`.
"""

from collections.abc import Iterable, Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, Field, model_validator

from serve.engine.protocol import Delta, JsonFormat, Message, Sampling, TokenLogprob, Tool, Toolbox, ToolCall
from serve.errors import InvalidRequest
from serve.formats.body_budget import FreeObject, Items
from serve.formats.bounds import bound, check_tools, schema_text
from serve.formats.logprobs import token_logprob
from serve.formats.response_format import Json
from serve.formats.sampling import GenerationBody, RequestBounds
from serve.formats.schema_budget import Schema
from serve.inference.answer import Choice
from serve.inference.request import GenerationResult, InferenceRequest

FUNCTION_NAME = r"^[a-zA-Z0-9_-]{1,64}$"
TOOL_CALLS_MAX = 128
FORMAT_SCHEMA = "response_format.json_schema.schema"

FunctionName = Annotated[str, Field(pattern=FUNCTION_NAME)]
CallId = Annotated[str, Field(min_length=1, max_length=256)]


class TextPart(BaseModel):
    type: Literal["text"]
    text: str


class RefusalPart(BaseModel):
    """An assistant's refusal in an earlier answer, which the client sends back."""

    type: Literal["refusal"]
    refusal: str

    @property
    def text(self) -> str:
        return self.refusal


class CalledFunction(BaseModel):
    """A call in an earlier answer. Arguments that were cut by a limit are no JSON, and come back so."""

    name: FunctionName
    arguments: str


class AssistantToolCall(BaseModel):
    id: CallId
    type: Literal["function"]
    function: CalledFunction


class ChatMessage(BaseModel):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Items[TextPart | RefusalPart] | None = None
    refusal: str | None = None
    name: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    tool_calls: (
        Annotated[list[AssistantToolCall], Field(max_length=TOOL_CALLS_MAX, fail_fast=True)] | None
    ) = None
    tool_call_id: CallId | None = None

    @model_validator(mode="after")
    def _consistent(self) -> "ChatMessage":
        if self.tool_calls and self.role != "assistant":
            raise ValueError("only an assistant's message may hold tool_calls")
        if self.role == "tool" and self.tool_call_id is None:
            raise ValueError("a tool's message needs a tool_call_id")
        parts = self.content if isinstance(self.content, list) else ()
        refuses = self.refusal is not None or any(isinstance(part, RefusalPart) for part in parts)
        if refuses and self.role != "assistant":
            raise ValueError("only an assistant's message may hold a refusal")
        if self.content is None and self.refusal is None and not self.tool_calls:
            raise ValueError("the message has no content")
        return self

    def message(self) -> Message:
        """The message in the engine's terms. Chat templates know no refusals: one is the turn's text."""
        text = "".join(p.text for p in self.content) if isinstance(self.content, list) else self.content
        if self.refusal is not None:
            text = (text or "") + self.refusal
        calls = tuple(
            ToolCall(index, call.id, call.function.name, call.function.arguments)
            for index, call in enumerate(self.tool_calls or ())
        )
        role = "system" if self.role == "developer" else self.role
        return Message(role, text, calls, self.tool_call_id if role == "tool" else None, self.name)


class OfferedFunction(BaseModel):
    name: FunctionName
    description: str | None = None
    parameters: FreeObject | None = None
    strict: bool | None = None


class OfferedTool(BaseModel):
    type: Literal["function"]
    function: OfferedFunction


class NamedFunction(BaseModel):
    name: FunctionName


class NamedTool(BaseModel):
    type: Literal["function"]
    function: NamedFunction


class StructuredOutputSchema(BaseModel):
    name: FunctionName
    description: str | None = None
    # Not called `schema`, which pydantic's models have already.
    document: FreeObject | None = Field(None, alias="schema")
    strict: bool | None = None


class StructuredOutput(BaseModel):
    """The body's `response_format`: the answer is text, JSON, or JSON that follows a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: StructuredOutputSchema | None = None

    @model_validator(mode="after")
    def _schema_given(self) -> "StructuredOutput":
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("the type json_schema needs a json_schema")
        return self


class ChatCompletionRequest(GenerationBody):
    HARMLESS: ClassVar[dict[str, tuple[Any, ...]]] = {
        "add_special_tokens": (False,)
    }  # the template writes them

    messages: Items[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    tools: Items[OfferedTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: StructuredOutput | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> "ChatCompletionRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequest("'top_logprobs' needs 'logprobs' to be true.", "top_logprobs")
        named = self.tool_choice.function.name if isinstance(self.tool_choice, NamedTool) else None
        names = [tool.function.name for tool in self.tools or ()]
        check_tools(names, forced=self.tool_choice == "required", function=named)
        self.check_constraints(self._schemas(), self._constrained_by())
        return self

    def _constrained_by(self) -> str | None:
        """The field that makes a grammar of the answer, if there is one."""
        if self.response_format is not None and self.response_format.type != "text":
            return "response_format"
        return "tools" if self.tools and self.tool_choice != "none" else None

    def _schemas(self) -> Iterator[Schema]:
        answer = self.response_format.json_schema if self.response_format else None
        if answer is not None and answer.document is not None:
            yield Schema(FORMAT_SCHEMA, answer.document)
        for index, tool in enumerate(self.tools or ()):
            function = tool.function
            if function.parameters is not None:
                strict = function.strict is True
                yield Schema(_schema_param(index), function.parameters, function.name, strict)

    @property
    def completion_tokens_asked(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    def prompt(self, limits: RequestBounds) -> tuple[Message, ...]:
        bound("messages", len(self.messages), limits.messages, "messages")
        return tuple(message.message() for message in self.messages)

    def toolbox(self, limits: RequestBounds) -> Toolbox | None:
        if not self.tools:
            return None
        bound("tools", len(self.tools), limits.tools, "tools")
        tools = tuple(_tool(tool.function, index) for index, tool in enumerate(self.tools))
        parallel = self.parallel_tool_calls is not False
        if isinstance(self.tool_choice, NamedTool):
            return Toolbox(tools, "required", self.tool_choice.function.name, parallel)
        return Toolbox(tools, self.tool_choice or "auto", None, parallel)

    def sampling(self, limits: RequestBounds) -> Sampling:
        return self.sampling_with(
            limits,
            completion_tokens_max=self.completion_tokens_asked,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            format=self._json_format(),
        )

    def _json_format(self) -> JsonFormat | None:
        output = self.response_format
        if output is None or output.type == "text":
            return None
        if output.json_schema is None or output.json_schema.document is None:
            return JsonFormat()
        return JsonFormat(schema_text(output.json_schema.document), FORMAT_SCHEMA)


def _tool(function: OfferedFunction, index: int) -> Tool:
    parameters = None if function.parameters is None else schema_text(function.parameters)
    return Tool(function.name, function.description, parameters, function.strict, _schema_param(index))


def _schema_param(index: int) -> str:
    return f"tools.{index}.function.parameters"


def request_of(body: ChatCompletionRequest, request_id: str, limits: RequestBounds) -> InferenceRequest:
    """The body in the gateway's terms. Raises InvalidRequest beyond the installation's bounds."""
    return InferenceRequest(
        request_id=request_id,
        model=body.model,
        prompt=body.prompt(limits),
        sampling=body.sampling(limits),
        toolbox=body.toolbox(limits),
        reasoning_effort=body.reasoning_effort,
        collect=not body.stream,
        completion_tokens_asked=body.completion_tokens_asked,
    )


class ChatFormat:
    """Writes chat.completion and chat.completion.chunk objects."""

    def opening_choices(self, result: GenerationResult) -> Iterable[Json]:
        toolbox = result.request.toolbox
        # A call has no content, so the opening must not claim an empty text; a text comes as deltas.
        content = None if toolbox is not None and toolbox.choice != "none" else ""
        for index in range(result.request.choices):
            delta = {"role": "assistant", "content": content}
            yield {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def streamed_choice(self, delta: Delta) -> Json:
        fields: Json = {}
        if delta.reasoning:
            fields["reasoning_content"] = delta.reasoning
        if delta.text:
            fields["content"] = delta.text
        if delta.tool_calls:
            fields["tool_calls"] = [_tool_call_delta(call) for call in delta.tool_calls]
        return {
            "index": delta.index,
            "delta": fields,
            "logprobs": _logprobs(delta.logprobs) if delta.logprobs else None,
            "finish_reason": delta.finish_reason,
        }

    def complete_choice(self, choice: Choice, result: GenerationResult) -> Json:
        tool_calls = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in choice.tool_calls
        ]
        message: Json = {"role": "assistant", "content": choice.text, "refusal": None}
        if tool_calls:
            message |= {"content": choice.text or None, "tool_calls": tool_calls}
        if choice.reasoning:
            message["reasoning_content"] = choice.reasoning
        return {
            "index": choice.index,
            "message": message,
            "logprobs": _logprobs(choice.logprobs) if result.request.sampling.logprobs is not None else None,
            "finish_reason": choice.finish_reason,
        }

    def envelope(self, result: GenerationResult, choices: list[Json], *, streamed: bool) -> Json:
        return {
            "id": "chatcmpl-" + result.request.request_id.removeprefix("req_"),
            "object": "chat.completion.chunk" if streamed else "chat.completion",
            "created": int(result.created_at.timestamp()),
            "model": result.model,
            "choices": choices,
        }


def _tool_call_delta(call: ToolCall) -> Json:
    """A call's first delta names the function; later deltas carry arguments only."""
    function: Json = {"arguments": call.arguments}
    if call.name is None:
        return {"index": call.index, "function": function}
    return {
        "index": call.index,
        "id": call.id,
        "type": "function",
        "function": {"name": call.name} | function,
    }


def _logprobs(tokens: Iterable[TokenLogprob]) -> Json:
    return {"content": [token_logprob(token) for token in tokens], "refusal": None}
