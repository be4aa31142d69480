"""Describes the Responses API's answers for the OpenAPI document; see `serve.api.schemas`."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Status = Literal["in_progress", "completed", "incomplete"]


class _Object(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ResponseLogprobAlternative(_Object):
    token: str
    logprob: float
    bytes: list[int]


class ResponseLogprob(ResponseLogprobAlternative):
    top_logprobs: list[ResponseLogprobAlternative]


class OutputTextPart(_Object):
    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[ResponseLogprob]


class InputTextPart(_Object):
    type: Literal["input_text"]
    text: str


class ReasoningTextPart(_Object):
    type: Literal["reasoning_text"]
    text: str


class MessageItem(_Object):
    type: Literal["message"]
    id: str
    status: Status
    role: Literal["user", "assistant", "system", "developer"]
    content: list[InputTextPart | OutputTextPart]


class FunctionCallItem(_Object):
    type: Literal["function_call"]
    id: str
    status: Status
    call_id: str
    name: str
    namespace: str = ""
    arguments: str = Field(description="JSON text.")


class FunctionCallOutputItem(_Object):
    type: Literal["function_call_output"]
    id: str
    status: Status
    call_id: str
    output: str


class CustomToolCallItem(_Object):
    type: Literal["custom_tool_call"]
    id: str
    status: Status
    call_id: str
    name: str
    namespace: str = ""
    input: str


class CustomToolCallOutputItem(_Object):
    type: Literal["custom_tool_call_output"]
    id: str
    status: Status
    call_id: str
    output: str


class ReasoningItem(_Object):
    type: Literal["reasoning"]
    id: str
    status: Status
    summary: list[Any]
    content: list[ReasoningTextPart]


class InputTokensDetails(_Object):
    cached_tokens: int
    cache_write_tokens: int


class OutputTokensDetails(_Object):
    reasoning_tokens: int = Field(description="Always 0: they are output tokens, and not counted apart.")


class ResponseUsage(_Object):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class ResponseFailure(_Object):
    code: Literal["server_error"]
    message: str


class IncompleteDetails(_Object):
    reason: Literal["max_output_tokens"]


class ReasoningSettings(_Object):
    effort: str | None
    summary: None


class ResponseObject(_Object):
    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    background: Literal[False]
    error: ResponseFailure | None
    incomplete_details: IncompleteDetails | None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: None
    metadata: dict[str, str]
    model: str
    output: list[MessageItem | FunctionCallItem | CustomToolCallItem | ReasoningItem]
    parallel_tool_calls: bool
    previous_response_id: str | None
    reasoning: ReasoningSettings
    service_tier: Literal["default"]
    store: bool = Field(description="Whether it can be read again, and continued.")
    temperature: float
    text: dict[str, Any]
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float
    truncation: Literal["disabled"]
    usage: ResponseUsage | None
    user: str | None


class InputTokenCount(_Object):
    object: Literal["response.input_tokens"]
    input_tokens: int


class ResponseEvent(BaseModel):
    """One of OpenAI's typed events. Its other fields depend on its type."""

    type: str
    sequence_number: int


class DeletedResponse(_Object):
    id: str
    object: Literal["response"]
    deleted: Literal[True]


class InputItemList(_Object):
    object: Literal["list"]
    data: list[
        MessageItem
        | FunctionCallItem
        | FunctionCallOutputItem
        | CustomToolCallItem
        | CustomToolCallOutputItem
        | ReasoningItem
    ]
    first_id: str | None
    last_id: str | None
    has_more: bool
