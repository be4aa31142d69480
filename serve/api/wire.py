"""Request bodies as the OpenAI API defines them (platform.openai.com/docs/api-reference/chat/create).

Fields we do not know are ignored, as OpenAI's SDKs send new ones all the time. Fields that would
change the answer but are not implemented are refused by name: silence would be a wrong answer.
"""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails

from serve.engine.base import Message, Sampling
from serve.errors import InvalidRequest

# vLLM's own extensions that reach into the engine or another tenant's cache.
HARMFUL = frozenset(
    {
        "chat_template",
        "chat_template_kwargs",
        "cache_salt",
        "prompt_embeds",
        "prompt_token_ids",
        "lora_request",
    }
    | {
        "mm_processor_kwargs",
        "kv_transfer_params",
        "vllm_xargs",
        "documents",
        "priority",
        "add_generation_prompt",
    }
)
# Known OpenAI fields, each with the values that ask for nothing we lack.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "logit_bias": (None, {}),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "suffix": (None, ""),
    "echo": (None, False),
    "best_of": (None, 1),
    "web_search_options": (None,),
}

Penalty = Annotated[float, Field(ge=-2, le=2)]


class Limits(BaseModel):
    """Bounds that depend on the installation; passed as validation context."""

    model_config = ConfigDict(frozen=True)

    messages: int
    n: int
    stop_sequences: int
    completion_tokens: int


class StreamOptions(BaseModel):
    include_usage: bool = False


class TextPart(BaseModel):
    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    def message(self) -> Message:
        text = self.content if isinstance(self.content, str) else "".join(p.text for p in self.content)
        return Message("system" if self.role == "developer" else self.role, text)


class _Generation(BaseModel):
    """What chat and text completions have in common."""

    model: str = Field(min_length=1, max_length=160)
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: int | None = Field(None, ge=1)
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    stop: str | list[str] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, data: Any) -> Any:
        if isinstance(data, dict):
            for name in data.keys() & HARMFUL:
                raise InvalidRequest(
                    f"The parameter '{name}' is not accepted.", name, "unsupported_parameter"
                )
            for name in data.keys() & UNSUPPORTED.keys():
                if data[name] not in UNSUPPORTED[name]:
                    raise InvalidRequest(
                        f"The parameter '{name}' is not supported with this value.",
                        name,
                        "unsupported_parameter",
                    )
        return data

    @field_validator("stop")
    @classmethod
    def _stop_not_empty(cls, stop: str | list[str] | None) -> str | list[str] | None:
        if any(not 1 <= len(one) <= 256 for one in _as_list(stop)):
            raise ValueError("stop sequences must have between 1 and 256 characters")
        return stop

    @model_validator(mode="after")
    def _stream_options_need_stream(self) -> "_Generation":
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest(
                "The 'stream_options' parameter is only allowed when 'stream' is enabled.", "stream_options"
            )
        return self

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def _sampling(self, completion_tokens_max: int | None, name: str, limits: Limits) -> Sampling:
        stop = tuple(_as_list(self.stop))
        n = self.n or 1
        _bound("n", n, limits.n)
        _bound("stop", len(stop), limits.stop_sequences, "stop sequences")
        _bound(name, completion_tokens_max or 1, limits.completion_tokens)
        return Sampling(
            completion_tokens_max=completion_tokens_max,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            n=n,
            seed=self.seed,
            stop=stop,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
        )


class ChatCompletionRequest(_Generation):
    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)

    @property
    def length_param(self) -> str:
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"

    def prompt(self, limits: Limits) -> tuple[Message, ...]:
        _bound("messages", len(self.messages), limits.messages, "messages")
        return tuple(message.message() for message in self.messages)

    def sampling(self, limits: Limits) -> Sampling:
        return self._sampling(self.max_completion_tokens or self.max_tokens, self.length_param, limits)


class CompletionRequest(_Generation):
    prompt: str

    @field_validator("prompt", mode="before")
    @classmethod
    def _one_prompt(cls, prompt: Any) -> Any:
        return prompt[0] if isinstance(prompt, list) and len(prompt) == 1 else prompt

    @field_validator("prompt")
    @classmethod
    def _prompt_not_empty(cls, prompt: str) -> str:
        if not prompt:
            raise ValueError("the prompt is empty")
        return prompt

    def sampling(self, limits: Limits) -> Sampling:
        return self._sampling(self.max_tokens or 16, "max_tokens", limits)  # 16 is OpenAI's default


Body = TypeVar("Body", bound=_Generation)


def parse(kind: type[Body], body: bytes) -> Body:
    """Raises InvalidRequest naming the first field that is wrong."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False, include_input=False)
        field = _path(found[0])
        # A field of several types has an error for each; the deepest one is of the type that was meant.
        deepest = max(
            (one for one in found if _path(one)[: len(field)] == field), key=lambda e: len(_path(e))
        )
        param = ".".join(_path(deepest)) or None
        text = "The body is not valid JSON." if deepest["type"] == "json_invalid" else deepest["msg"]
        raise InvalidRequest(f"{param}: {text}" if param else text, param, "invalid_value") from None


def _path(error: ErrorDetails) -> list[str]:
    """Positions in lists stay, names of union branches go: messages.0.content, not ….content.str."""
    return [str(part) for part in error["loc"] if isinstance(part, int) or part in _FIELDS]


def _bound(param: str, value: int, limit: int, noun: str = "") -> None:
    if value > limit:
        what = f"At most {limit} {noun} are allowed" if noun else f"'{param}' must be at most {limit}"
        raise InvalidRequest(f"{what}; you sent {value}.", param, "invalid_value")


def _as_list(stop: str | list[str] | None) -> list[str]:
    return [stop] if isinstance(stop, str) else stop or []


_FIELDS = {
    name
    for model in (ChatCompletionRequest, CompletionRequest, ChatMessage, StreamOptions, TextPart)
    for name in model.model_fields
}
