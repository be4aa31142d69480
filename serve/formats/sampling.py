"""Parses generation bodies: the sampling fields that chat and text completions share, and refused fields.

platform.openai.com/docs/api-reference/chat/create. Unknown fields are ignored, because OpenAI's SDKs send new
ones all the time. Fields that would change the answer but are not implemented are refused by name: to ignore
them would give a wrong answer.
"""

import re
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails

from serve.engine.protocol import JsonFormat, Sampling
from serve.errors import InvalidRequest
from serve.formats.bounds import bound, clamped
from serve.formats.errors import validation_text

# vLLM's extensions that reach into the engine or another tenant's cache, or get around a bound, each with the
# values that change nothing. Clients made for vLLM send its defaults.
# fmt: off
HARMFUL: dict[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True,), "add_special_tokens": (), "allowed_token_ids": (), "bad_words": ([],),
    "cache_salt": (), "chat_template": (), "chat_template_kwargs": ({},), "continue_final_message": (False,),
    "documents": ([],), "ec_transfer_params": (), "guided_choice": (), "guided_grammar": (),
    "guided_json": (), "guided_regex": (), "ignore_eos": (False,), "include_reasoning": (True,),
    "include_stop_str_in_output": (False,), "kv_transfer_params": (), "length_penalty": (1.0,),
    "logprob_token_ids": ([],), "lora_request": (), "media_io_kwargs": ({},), "min_tokens": (0,),
    "mm_payload": (), "mm_processor_kwargs": ({},), "priority": (0,), "prompt_embeds": (),
    "prompt_logprobs": (), "prompt_token_ids": (), "repetition_detection": (), "request_id": (),
    "return_mm_kwargs": (False,), "return_prompt_text": (False,), "return_token_ids": (False,),
    "return_token_offsets": (False,), "return_tokens_as_token_ids": (False,),
    "routed_experts_prompt_start": (0,), "session_id": (), "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,), "stop_token_ids": ([],), "stream_interval": (),
    "structured_outputs": (), "thinking_token_budget": (), "truncate_prompt_tokens": (),
    "truncation_side": ("left", "right"),  # of what `truncate_prompt_tokens` cuts
    "use_beam_search": (False,), "vllm_xargs": ({},), "watermarking": (False,),
}
# fmt: on
# OpenAI's fields that are not implemented, each with the values that change nothing.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "suffix": ("",),
    "web_search_options": (),
}
LOGIT_BIASES_MAX = 1024
CHOICES_MAX = 64

Bias = Annotated[float, Field(ge=-100, le=100)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
TopP = Annotated[float, Field(ge=0, le=1)]
# OpenAI and Anthropic allow 0, and vLLM does not. Both leave the likeliest token alone.
TOP_P_MIN = 1e-6


class RequestBounds(BaseModel):
    """Holds the bounds on a body's fields that depend on the installation."""

    model_config = ConfigDict(frozen=True)

    messages: int
    n: int
    stop_sequences: int
    completion_tokens: int
    tools: int
    prompts: int


class StreamOptions(BaseModel):
    include_usage: bool = False
    continuous_usage_stats: bool | None = None

    @field_validator("continuous_usage_stats")
    @classmethod
    def _usage_once(cls, continuous: bool | None) -> bool | None:
        """vLLM's: usage in every chunk. Ours comes once, at the end."""
        if continuous:
            raise InvalidRequest(
                "'stream_options.continuous_usage_stats' is not supported: the usage comes once, at the end.",
                "stream_options.continuous_usage_stats",
                "unsupported_parameter",
            )
        return continuous


class GenerationBody(BaseModel):
    """Holds the fields that chat and text completions share."""

    HARMLESS: ClassVar[dict[str, tuple[Any, ...]]] = {}

    model: str = Field(min_length=1, max_length=160)
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: TopP | None = None
    n: int | None = Field(None, ge=1)
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    stop: str | list[str] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: dict[Annotated[str, Field(pattern=r"^\d{1,9}$")], Bias] | None = None
    top_k: int | None = Field(None, ge=-1, le=2**31 - 1)
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=2)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, data: Any) -> Any:
        if isinstance(data, dict):
            refuse(data, cls.HARMLESS)
        return data

    @field_validator("stop")
    @classmethod
    def _stop_not_empty(cls, stop: str | list[str] | None) -> str | list[str] | None:
        if any(not 1 <= len(sequence) <= 256 for sequence in _as_list(stop)):
            raise ValueError("stop sequences must have between 1 and 256 characters")
        return stop

    @model_validator(mode="after")
    def _stream_options_need_stream(self) -> "GenerationBody":
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest(
                "The 'stream_options' parameter is only allowed when 'stream' is enabled.", "stream_options"
            )
        return self

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling_with(
        self,
        limits: RequestBounds,
        *,
        completion_tokens_max: int | None,
        logprobs: int | None = None,
        echo: bool = False,
        format: JsonFormat | None = None,
    ) -> Sampling:
        """The body's sampling parameters. Raises InvalidRequest beyond the installation's bounds."""
        stop, n = tuple(_as_list(self.stop)), self.n or 1
        bound("n", n, limits.n)
        bound("stop", len(stop), limits.stop_sequences, "stop sequences")
        bound("logit_bias", len(self.logit_bias or ()), LOGIT_BIASES_MAX, "tokens")
        return Sampling(
            completion_tokens_max=clamped(completion_tokens_max, limits.completion_tokens),
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=top_p_of(self.top_p),
            n=n,
            seed=self.seed,
            stop=stop,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias=tuple((int(token), bias) for token, bias in (self.logit_bias or {}).items()),
            logprobs=logprobs,
            echo=echo,
            format=format,
            top_k=self.top_k or 0,
            min_p=self.min_p or 0.0,
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
        )


Body = TypeVar("Body", bound=BaseModel)


def refuse(data: dict[str, Any], harmless: dict[str, tuple[Any, ...]] | None = None) -> None:
    """Raises InvalidRequest for a HARMFUL or UNSUPPORTED field with a value that changes something.

    Null is fine. harmless: more values that change nothing in this API.
    """
    more = harmless or {}
    for name in sorted(data.keys() & HARMFUL.keys()):
        if not _changes_nothing(data[name], HARMFUL[name] + more.get(name, ())):
            raise InvalidRequest(f"The parameter '{name}' is not accepted.", name, "unsupported_parameter")
    for name in sorted(data.keys() & UNSUPPORTED.keys()):
        if not _changes_nothing(data[name], UNSUPPORTED[name]):
            raise InvalidRequest(
                f"The parameter '{name}' is not supported with this value.", name, "unsupported_parameter"
            )


def _changes_nothing(value: Any, harmless: tuple[Any, ...]) -> bool:
    """True for null and for a value of `harmless`. In Python 1 equals True; in JSON it does not."""
    same = (value == each and isinstance(value, bool) == isinstance(each, bool) for each in harmless)
    return value is None or any(same)


def parse(kind: type[Body], body: bytes) -> Body:
    """`body` as a `kind`. Raises InvalidRequest that names the first wrong field."""
    try:
        return kind.model_validate_json(body, strict=True)
    except ValidationError as error:
        details = error.errors(include_url=False, include_context=False, include_input=False)
        field = _path(details[0])
        # A union field has one error for each of its types; the deepest is of the type that was meant.
        deepest = max(
            (detail for detail in details if _path(detail)[: len(field)] == field),
            key=lambda detail: len(_path(detail)),
        )
        param = ".".join(_path(deepest)) or None
        text = (
            "The body is not valid JSON." if deepest["type"] == "json_invalid" else validation_text(deepest)
        )
        raise InvalidRequest(f"{param}: {text}" if param else text, param, "invalid_value") from None


def _path(error: ErrorDetails) -> list[str]:
    """The fields and positions without union branches: messages.0.content, not messages.0.content.str."""
    return [str(part) for part in error["loc"] if isinstance(part, int) or not _BRANCH.match(part)]


def top_p_of(top_p: float | None) -> float:
    """The share of the probability to sample from; all of it if the body names none."""
    return 1.0 if top_p is None else max(top_p, TOP_P_MIN)


def _as_list(stop: str | list[str] | None) -> list[str]:
    return [stop] if isinstance(stop, str) else stop or []


# Our fields are snake_case; pydantic names a union's branches after types: str, list[TextPart], TextPart.
_BRANCH = re.compile(r"^(str|int|float|bool|dict|list|[A-Z].*|.*[\[\]-].*)$")
