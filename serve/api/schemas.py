"""Describes answers for the OpenAPI document: generation answers, models, health, errors, the API key.

Routes build their answers as plain JSON (`serve/formats`): to validate each chunk of a stream would cost
more than to make it. The tests check the JSON against these models. `openai.types` would not do here:
importing it adds 19 MiB and 1.3 s of CPU to every gateway process (155 MiB, 6.3 s without), and its models
allow any extra field and require no `usage`, so the document would no longer say exactly what is answered.
"""

from typing import Any, Literal

from fastapi import Security
from fastapi.security import HTTPBearer
from pydantic import BaseModel, ConfigDict, Field
from pydantic.json_schema import JsonSchemaMode

DESCRIPTIONS = {
    400: "The request breaks a rule; `param` names the field.",
    401: "No key, or not a live one.",
    403: "The key lacks the scope, or its tenant is suspended.",
    404: "There is no such thing, or it is another tenant's.",
    408: "The body did not arrive in time.",
    409: "It exists already, or its state forbids what was asked.",
    413: "The body is too large.",
    415: "The body is compressed in a way that is not understood.",
    422: "The model stopped with this same request some minutes ago.",
    429: "A limit is reached, or the credit does not cover the request.",
    431: "The headers are too large.",
    500: "The server failed.",
    503: "Try again later; `Retry-After` says when.",
}

# Schemas that FastAPI does not find by itself; `openapi.py` adds them to the document.
BODIES: dict[str, Any] = {}

# For the document only: `serve.api.dependencies` reads the key.
KEY_REQUIRED = Security(HTTPBearer(auto_error=False, scheme_name="key", description="An API key."))


def generation_responses(
    complete: type[BaseModel], chunk: type[BaseModel]
) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a generation route: JSON or, with `stream`, server-sent events of `chunk`."""
    if chunk is not complete:
        _reference(chunk, "serialization")
    success = {
        "model": complete,
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
        "description": f"With stream: events whose data is a {chunk.__name__}, an error, or [DONE].",
    }
    return {200: success} | errors(400, 401, 403, 404, 409, 413, 422, 429, 500, 503)


def json_body(model: type[BaseModel]) -> dict[str, Any]:
    """An operation's request body, for routes that read the body themselves after authentication."""
    schema = _reference(model, "validation")
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route whose errors have these statuses.

    The default response keeps FastAPI from declaring a 422 of its own form, which is never sent.
    """
    responses: dict[int | str, dict[str, Any]] = {
        status: {"model": ErrorBody, "description": DESCRIPTIONS[status]} for status in statuses
    }
    return responses | {"default": {"model": ErrorBody, "description": "Any other error."}}


def _reference(model: type[BaseModel], mode: JsonSchemaMode) -> dict[str, str]:
    schema = model.model_json_schema(ref_template="#/components/schemas/{model}", mode=mode)
    BODIES.update(schema.pop("$defs", {}))
    BODIES[model.__name__] = schema
    return {"$ref": f"#/components/schemas/{model.__name__}"}


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None = Field(description="The field that is wrong.")
    code: str | None = Field(description="The rule that it breaks, for programs.")


class ErrorBody(BaseModel):
    """The body of every error."""

    error: ErrorDetail


FinishReason = Literal["stop", "length", "tool_calls", "content_filter"]


class _Object(BaseModel):
    model_config = ConfigDict(extra="forbid")


class PromptTokensDetails(_Object):
    cached_tokens: int


class Usage(_Object):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class TopLogprob(_Object):
    token: str
    logprob: float
    bytes: list[int]


class ContentLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(_Object):
    content: list[ContentLogprob]
    refusal: None


class Function(_Object):
    name: str
    arguments: str


class ToolCall(_Object):
    id: str
    type: Literal["function"]
    function: Function


class AssistantMessage(_Object):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: str = ""
    tool_calls: list[ToolCall] = []


class ChatChoice(_Object):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(_Object):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class FunctionPiece(_Object):
    name: str = ""
    arguments: str


class ToolCallPiece(_Object):
    index: int
    id: str = ""
    type: Literal["function"] = "function"
    function: FunctionPiece


class ChatDelta(_Object):
    role: Literal["assistant"] = "assistant"
    content: str | None = ""
    reasoning_content: str = ""
    tool_calls: list[ToolCallPiece] = []


class ChatChunkChoice(_Object):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class ChatCompletionChunk(_Object):
    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class TextLogprobs(_Object):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class TextChoice(_Object):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: FinishReason | None


class TextCompletion(_Object):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage | None = None


class EmbeddingObject(_Object):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str = Field(description="Numbers; with base64, little-endian float32 as text.")


class EmbeddingUsage(_Object):
    prompt_tokens: int
    total_tokens: int


class EmbeddingList(_Object):
    object: Literal["list"]
    data: list[EmbeddingObject]
    model: str
    usage: EmbeddingUsage


class Model(_Object):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(_Object):
    object: Literal["list"]
    data: list[Model]


class HealthStatus(_Object):
    status: str


class Readiness(HealthStatus):
    bases: list[str]
