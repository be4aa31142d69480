"""Parses generation bodies: the sampling fields that chat and text completions share, and refused fields.

platform.openai.com/docs/api-reference/chat/create. Unknown fields are ignored, because OpenAI's SDKs send new
ones all the time. Fields that would change the answer but are not implemented are refused by name: to ignore
them would give a wrong answer.
"""

import re
from collections.abc import Iterable
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails

from serve.engine.protocol import JsonFormat, Sampling, TextFormat
from serve.errors import InvalidRequest
from serve.formats.body_budget import COST_MAX, FreeObject, Items, check_body
from serve.formats.bounds import bound, clamped
from serve.formats.errors import validation_text
from serve.formats.schema_budget import Schema, check_schemas
from serve.formats.structured_outputs import GUIDED, Choices, Constraint, StructuredOutputs, constraints_of

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
# Of these, the ones that chat and text completions take.
TAKEN = frozenset(
    {"ignore_eos", "min_tokens", "stop_token_ids", "structured_outputs"}
    | {f"guided_{kind}" for kind in GUIDED}
)
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
STOP_TOKENS_MAX = 64
CHOICES_MAX = 64
ERRORS_MAX = 64  # of one body that are looked at

TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokenIds = Annotated[list[TokenId], Field(max_length=COST_MAX, fail_fast=True)]
Bias = Annotated[float, Field(ge=-100, le=100)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Seed = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
TopK = Annotated[int, Field(ge=-1, le=2**31 - 1)]
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
    seed: Seed | None = None
    stop: str | Items[str] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: (
        Annotated[
            dict[Annotated[str, Field(pattern=r"^\d{1,9}$")], Bias],
            Field(max_length=2 * LOGIT_BIASES_MAX, fail_fast=True),
        ]
        | None
    ) = None
    top_k: TopK | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=2)] | None = None
    min_tokens: int | None = Field(None, ge=0)
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=STOP_TOKENS_MAX, fail_fast=True)] | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: FreeObject | str | None = None
    guided_regex: Annotated[str, Field(min_length=1)] | None = None
    guided_choice: Choices | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, data: Any) -> Any:
        if isinstance(data, dict):
            refuse(data, cls.HARMLESS, TAKEN)
        return data

    @field_validator("stop")
    @classmethod
    def _stop_not_empty(cls, stop: str | list[str] | None) -> str | list[str] | None:
        return check_stop(stop)

    @field_validator("structured_outputs")
    @classmethod
    def _one_form(cls, outputs: StructuredOutputs | None) -> StructuredOutputs | None:
        if outputs is not None and not any(constraints_of(outputs, "structured_outputs.")):
            raise ValueError("one of json, json_object, regex and choice is needed")
        return outputs

    @model_validator(mode="after")
    def _stream_options_need_stream(self) -> "GenerationBody":
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest(
                "The 'stream_options' parameter is only allowed when 'stream' is enabled.", "stream_options"
            )
        return self

    def constraints(self) -> list[Constraint]:
        """What vLLM's fields ask the answer to be."""
        outputs = self.structured_outputs or StructuredOutputs()
        guided = StructuredOutputs(
            document=self.guided_json, regex=self.guided_regex, choice=self.guided_choice
        )
        return [*constraints_of(outputs, "structured_outputs."), *constraints_of(guided, "guided_")]

    def check_constraints(self, schemas: Iterable[Schema], constrained_by: str | None) -> None:
        """Checks all schemas together. constrained_by: another field that constrains the answer.

        Raises InvalidRequest, also if the answer could not end where its form is complete.
        """
        constraints = self.constraints()
        params = [constraint.param for constraint in constraints]
        if len(params) + (constrained_by is not None) > 1:
            others = " and ".join(f"'{param}'" for param in [*params[1:], constrained_by] if param)
            raise InvalidRequest(f"'{params[0]}' is not possible together with {others}.", params[0])
        constrained_by = constrained_by or next(iter(params), None)
        for name in ("min_tokens", "ignore_eos"):
            if constrained_by is not None and getattr(self, name):
                text = f"'{name}' is not possible together with '{constrained_by}'."
                raise InvalidRequest(text, name, "unsupported_parameter")
        check_schemas([*schemas, *(each.schema for each in constraints if each.schema is not None)])

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
        stop, n = stop_of(self.stop), self.n or 1
        constraint = next(iter(self.constraints()), None)
        constrained = constraint.format if constraint is not None else format
        bound("n", n, limits.n)
        bound("stop", len(stop), limits.stop_sequences, "stop sequences")
        bound("logit_bias", len(self.logit_bias or ()), LOGIT_BIASES_MAX, "tokens")
        completion_tokens_max = clamped(completion_tokens_max, limits.completion_tokens)
        least, most = self.min_tokens or 0, completion_tokens_max
        bound("min_tokens", least, limits.completion_tokens if most is None else most, "tokens")
        return Sampling(
            completion_tokens_max=completion_tokens_max,
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
            format=constrained if isinstance(constrained, JsonFormat) else None,
            text_format=constrained if isinstance(constrained, TextFormat) else None,
            completion_tokens_min=least,
            ignore_eos=bool(self.ignore_eos),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            top_k=self.top_k or 0,
            min_p=self.min_p or 0.0,
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
        )


Body = TypeVar("Body", bound=BaseModel)


def refuse(
    data: dict[str, Any],
    harmless: dict[str, tuple[Any, ...]] | None = None,
    taken: frozenset[str] = frozenset(),
) -> None:
    """Raises InvalidRequest for a HARMFUL or UNSUPPORTED field with a value that changes something.

    Null is fine. harmless: more values that change nothing in this API. taken: fields that this API has.
    """
    more = harmless or {}
    for name in sorted((data.keys() & HARMFUL.keys()) - taken):
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
    check_body(body)
    try:
        return kind.model_validate_json(body, strict=True)
    except ValidationError as error:
        if error.error_count() > ERRORS_MAX:
            text = f"The body breaks more than {ERRORS_MAX} rules."
            raise InvalidRequest(text, None, "invalid_value") from None
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


def stop_of(stop: str | list[str] | None) -> tuple[str, ...]:
    """The stop sequences, of which a body may give one or several."""
    return (stop,) if isinstance(stop, str) else tuple(stop or ())


def check_stop(stop: str | list[str] | None) -> str | list[str] | None:
    """Raises ValueError for a stop sequence that is empty or too long."""
    if any(not 1 <= len(sequence) <= 256 for sequence in stop_of(stop)):
        raise ValueError("stop sequences must have between 1 and 256 characters")
    return stop


# Our fields are snake_case; pydantic names a union's branches after types: str, list[TextPart], TextPart.
_BRANCH = re.compile(r"^(str|int|float|bool|dict|list|[A-Z].*|.*[\[\]-].*)$")
