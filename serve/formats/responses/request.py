"""Parses the body of `POST /v1/responses` — platform.openai.com/docs/api-reference/responses/create.

The rules are those of `serve.formats.sampling`: unknown fields are ignored, and a field that would change the
answer but is not implemented is refused by name. Reference: `openai.types.responses.ResponseCreateParams`.
"""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Discriminator, Field, Tag, field_validator, model_validator

from serve.engine.protocol import JsonFormat, Sampling, Toolbox
from serve.errors import InvalidRequest
from serve.formats.body_budget import ITEMS_MAX, FreeObject, Items
from serve.formats.bounds import bound, check_tools, clamped, schema_text
from serve.formats.chat import CalledFunction, CallId, FunctionName
from serve.formats.responses.tools import (
    CUSTOM_SCHEMA,
    HOSTED,
    FunctionTool,
    Offer,
    ResponsesTool,
    ignored,
    offers,
    tag_of,
)
from serve.formats.sampling import (
    Penalty,
    RequestBounds,
    Seed,
    StreamOptions,
    TopK,
    TopP,
    check_stop,
    refuse,
    stop_of,
    top_p_of,
)
from serve.formats.schema_budget import Schema, check_schemas

METADATA_PAIRS_MAX = 16
FORMAT_SCHEMA = "text.format.schema"
LOGPROBS = "message.output_text.logprobs"
# What an answer may include besides: parts of items that no answer of ours has, so that there is nothing to
# add. Reasoning is given as it is.
NOTHING_TO_INCLUDE = frozenset(
    {
        "code_interpreter_call.outputs",
        "computer_call_output.output.image_url",
        "file_search_call.results",
        "message.input_image.image_url",
        "reasoning.encrypted_content",
        "web_search_call.action.sources",
        "web_search_call.results",
    }
)
INCLUDES_MAX = 16

# OpenAI's fields that are not implemented, each with the values that change nothing.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "background": (False,),
    "best_of": (1,),
    "echo": (False,),
    "logit_bias": ({},),
    "min_p": (0,),
    "n": (1,),
    "repetition_penalty": (1,),
    "context_management": ([],),
    "conversation": (),
    "moderation": (),
    "prompt": (),
    "truncation": ("disabled",),
}
# Fields of chat that have another name in the Responses API; to ignore them would change the answer.
MOVED = {
    "max_tokens": "max_output_tokens",
    "logprobs": "top_logprobs",
    "max_completion_tokens": "max_output_tokens",
    "messages": "input",
    "reasoning_effort": "reasoning.effort",
    "response_format": "text.format",
}


class InputText(BaseModel):
    type: Literal["input_text", "output_text"]
    text: str


class InputRefusal(BaseModel):
    """The assistant's refusal in an earlier answer, which the client sends back."""

    type: Literal["refusal"]
    refusal: str

    @property
    def text(self) -> str:
        return self.refusal


class InputMessage(BaseModel):
    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: str | Items[InputText | InputRefusal]

    @model_validator(mode="after")
    def _assistant_refuses(self) -> "InputMessage":
        parts = self.content if isinstance(self.content, list) else ()
        if self.role != "assistant" and any(isinstance(part, InputRefusal) for part in parts):
            raise ValueError("only an assistant's message may hold a refusal")
        return self

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class FunctionCall(CalledFunction):
    type: Literal["function_call"]
    call_id: CallId
    namespace: FunctionName | None = None


class CallOutput(BaseModel):
    call_id: CallId
    output: str | Items[InputText]

    @property
    def text(self) -> str:
        return self.output if isinstance(self.output, str) else "".join(part.text for part in self.output)


class FunctionCallOutput(CallOutput):
    type: Literal["function_call_output"]


class CustomToolCall(BaseModel):
    type: Literal["custom_tool_call"]
    call_id: CallId
    name: FunctionName
    input: str
    namespace: FunctionName | None = None


class CustomToolCallOutput(CallOutput):
    type: Literal["custom_tool_call_output"]


class ItemReference(BaseModel):
    """Names an item of a stored response, which stands in its place."""

    type: Literal["item_reference"] = "item_reference"
    id: Annotated[str, Field(min_length=1, max_length=128)]


class Reasoning(BaseModel):
    """An earlier answer's reasoning item that the client sends back. No chat template takes it."""

    type: Literal["reasoning"]


# In capitals, because `sampling.parse` leaves such names out of the path of a wrong field.
_TAGS = {
    "message": "Message",
    "function_call": "FunctionCall",
    "function_call_output": "FunctionCallOutput",
    "custom_tool_call": "CustomToolCall",
    "custom_tool_call_output": "CustomToolCallOutput",
    "item_reference": "ItemReference",
    "reasoning": "Reasoning",
}


def _tag(item: Any) -> str:
    kind = item.get("type") if isinstance(item, dict) else "message"
    if kind is None:
        # Both kinds may come without their type; a message has a role.
        kind = "item_reference" if "id" in item and "role" not in item else "message"
    if not isinstance(kind, str) or kind not in _TAGS:
        raise InvalidRequest(
            f"Input items of the type '{str(kind)[:64]}' are not supported.", "input", "unsupported_parameter"
        )
    return _TAGS[kind]


InputItem = Annotated[
    Annotated[InputMessage, Tag("Message")]
    | Annotated[FunctionCall, Tag("FunctionCall")]
    | Annotated[FunctionCallOutput, Tag("FunctionCallOutput")]
    | Annotated[CustomToolCall, Tag("CustomToolCall")]
    | Annotated[CustomToolCallOutput, Tag("CustomToolCallOutput")]
    | Annotated[ItemReference, Tag("ItemReference")]
    | Annotated[Reasoning, Tag("Reasoning")],
    Discriminator(_tag),
]


class NamedFunctionTool(BaseModel):
    type: Literal["function", "custom"]
    name: FunctionName


class TextFormat(BaseModel):
    type: Literal["text", "json_object", "json_schema"]
    name: FunctionName | None = None
    description: str | None = None
    # Not called `schema`, which pydantic's models have already.
    document: FreeObject | None = Field(None, alias="schema")
    strict: bool | None = None

    @model_validator(mode="after")
    def _schema_given(self) -> "TextFormat":
        if self.type == "json_schema" and (self.document is None or self.name is None):
            raise ValueError("the type json_schema needs a name and a schema")
        return self


class TextConfig(BaseModel):
    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = None


class ReasoningConfig(BaseModel):
    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    # "auto" leaves the choice to the server, which writes no summary.
    summary: Literal["auto"] | None = None
    generate_summary: Literal["auto"] | None = None


class ResponsesRequest(BaseModel):
    """The body. `seed`, `stop`, `top_k` and the penalties are chat's: vLLM's clients send them here too."""

    model: str = Field(min_length=1, max_length=160)
    input: str | Annotated[Items[InputItem], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: TopP | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: Items[ResponsesTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedFunctionTool | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: ReasoningConfig | None = None
    include: Annotated[list[str], Field(max_length=INCLUDES_MAX, fail_fast=True)] | None = None
    stream: bool | None = False
    store: bool | None = True
    previous_response_id: Annotated[str, Field(max_length=64)] | None = None
    metadata: (
        Annotated[
            dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]],
            Field(max_length=ITEMS_MAX, fail_fast=True),
        ]
        | None
    ) = None
    user: Annotated[str, Field(max_length=512)] | None = None
    stream_options: StreamOptions | None = None
    seed: Seed | None = None
    stop: str | Items[str] | None = None
    top_k: TopK | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        refuse(data)
        for name in sorted(data.keys() & MOVED.keys()):
            if data[name] is not None:
                raise _unsupported(name, f"in the Responses API it is '{MOVED[name]}'")
        for name in sorted(data.keys() & UNSUPPORTED.keys()):
            if data[name] is not None and data[name] not in UNSUPPORTED[name]:
                raise _unsupported(name, "not with this value")
        tools, choice = data.get("tools"), data.get("tool_choice")
        for index, tool in enumerate(tools if isinstance(tools, list) else ()):
            tag_of(tool, f"tools.{index}.type")
        _can_be_called(choice)
        return data

    @field_validator("include")
    @classmethod
    def _include_what_there_is(cls, include: list[str] | None) -> list[str] | None:
        for name in include or ():
            if name != LOGPROBS and name not in NOTHING_TO_INCLUDE:
                raise _unsupported("include", f"'{name[:64]}' cannot be given")
        return include

    @field_validator("stop")
    @classmethod
    def _stop_not_empty(cls, stop: str | list[str] | None) -> str | list[str] | None:
        return check_stop(stop)

    @field_validator("metadata")
    @classmethod
    def _metadata_bounded(cls, metadata: dict[str, str] | None) -> dict[str, str] | None:
        if len(metadata or ()) > METADATA_PAIRS_MAX:
            raise ValueError(f"at most {METADATA_PAIRS_MAX} pairs are allowed")
        return metadata

    @model_validator(mode="after")
    def _consistent(self) -> "ResponsesRequest":
        named = self.tool_choice.name if isinstance(self.tool_choice, NamedFunctionTool) else None
        names = [offer.name for offer in self.offers]
        forced = self.tool_choice == "required"
        if forced and not names and self.ignored_tools:
            kinds = ", ".join(self.ignored_tools)
            raise InvalidRequest(
                f"'tool_choice' requires a tool, and none of these is run here: {kinds}.",
                "tool_choice",
                "unsupported_parameter",
            )
        check_tools(names, forced=forced, function=named)
        check_schemas([*self._schemas()])
        return self

    def _schemas(self) -> Iterator[Schema]:
        answer = self.text.format if self.text else None
        if answer is not None and answer.document is not None:
            yield Schema(FORMAT_SCHEMA, answer.document)
        for offer in self.offers:
            tool = offer.tool
            if not isinstance(tool, FunctionTool):
                yield Schema(offer.param, CUSTOM_SCHEMA, tool.name, False)
            elif tool.parameters is not None:
                yield Schema(offer.schema_param, tool.parameters, tool.name, tool.strict is True)

    @property
    def offers(self) -> list[Offer]:
        """The tools that the model is offered."""
        return list(offers(self.tools or ()))

    @property
    def ignored_tools(self) -> list[str]:
        """The types of the tools that the model is not offered."""
        return ignored(self.tools or ())

    @property
    def references(self) -> list[str]:
        """The ids of the stored items that the input names."""
        if isinstance(self.input, str):
            return []
        return [item.id for item in self.input if isinstance(item, ItemReference)]

    @property
    def wants_logprobs(self) -> bool:
        return LOGPROBS in (self.include or ()) or bool(self.top_logprobs)

    @property
    def stores(self) -> bool:
        """True if the answer is stored: by default, as OpenAI's API does."""
        return self.store is not False

    def toolbox(self, limits: RequestBounds) -> Toolbox | None:
        offered = self.offers
        if not offered:
            return None
        bound("tools", len(offered), limits.tools, "tools")
        tools = tuple(offer.engine_tool() for offer in offered)
        parallel = self.parallel_tool_calls is not False
        if isinstance(self.tool_choice, NamedFunctionTool):
            return Toolbox(tools, "required", self.tool_choice.name, parallel)
        return Toolbox(tools, self.tool_choice or "auto", None, parallel)

    def sampling(self, limits: RequestBounds) -> Sampling:
        stop = stop_of(self.stop)
        bound("stop", len(stop), limits.stop_sequences, "stop sequences")
        return Sampling(
            seed=self.seed,
            stop=stop,
            top_k=self.top_k or 0,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            completion_tokens_max=clamped(self.max_output_tokens, limits.completion_tokens),
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=top_p_of(self.top_p),
            logprobs=(self.top_logprobs or 0) if self.wants_logprobs else None,
            format=self._json_format(),
        )

    def _json_format(self) -> JsonFormat | None:
        text_format = self.text.format if self.text else None
        if text_format is None or text_format.type == "text":
            return None
        if text_format.type == "json_object":
            return JsonFormat()
        assert text_format.document is not None  # TextFormat's own rule
        return JsonFormat(schema_text(text_format.document), FORMAT_SCHEMA)


def _can_be_called(choice: Any) -> None:
    """Raises InvalidRequest if the model must call a tool that it is not offered."""
    kind = choice.get("type", "function") if isinstance(choice, dict) else "function"
    if kind not in ("function", "custom"):
        what = "is not run here" if kind in HOSTED else "is not supported"
        raise InvalidRequest(
            f"'tool_choice' of the type '{str(kind)[:64]}' {what}.",
            "tool_choice.type",
            "unsupported_parameter",
        )


def _unsupported(param: str, why: str) -> InvalidRequest:
    return InvalidRequest(f"The parameter '{param}' is not supported: {why}.", param, "unsupported_parameter")
