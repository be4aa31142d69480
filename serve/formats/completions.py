"""Translates text completions: the body into an InferenceRequest, the answer into text_completion objects.

platform.openai.com/docs/api-reference/completions.
"""

from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Annotated, Any, ClassVar

from pydantic import Field, field_validator, model_validator

from serve.engine.protocol import Delta, Sampling, Texts, TokenLogprob
from serve.errors import InvalidRequest
from serve.formats.bounds import bound
from serve.formats.response_format import Json
from serve.formats.sampling import CHOICES_MAX, GenerationBody, RequestBounds
from serve.inference.answer import Choice
from serve.inference.request import GenerationResult, InferenceRequest

TokenId = Annotated[int, Field(ge=0, lt=2**31)]
COMPLETION_TOKENS_DEFAULT = 16  # OpenAI's


class CompletionRequest(GenerationBody):
    HARMLESS: ClassVar[dict[str, tuple[Any, ...]]] = {"add_special_tokens": (True,)}

    prompt: str | list[str] | list[TokenId] | list[list[TokenId]]
    logprobs: int | None = Field(None, ge=0, le=5)
    echo: bool | None = None
    best_of: int | None = Field(None, ge=1)

    @field_validator("prompt")
    @classmethod
    def _prompt_not_empty(cls, prompt: Any) -> Any:
        if not prompt or (isinstance(prompt, list) and any(entry in ("", []) for entry in prompt)):
            raise ValueError("the prompt is empty")
        return prompt

    @model_validator(mode="after")
    def _best_is_all(self) -> "CompletionRequest":
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise InvalidRequest(
                "'best_of' is not supported with a value other than 'n'.", "best_of", "unsupported_parameter"
            )
        return self

    def texts(self, limits: RequestBounds) -> Texts:
        prompt = self.prompt
        if isinstance(prompt, str):
            return Texts((prompt,))
        if isinstance(prompt[0], int):
            return Texts((tuple(prompt),))
        bound("prompt", len(prompt), limits.prompts, "prompts")
        bound("n", len(prompt) * (self.n or 1), CHOICES_MAX, "choices over all prompts")
        return Texts(tuple(entry if isinstance(entry, str) else tuple(entry) for entry in prompt))

    def sampling(self, limits: RequestBounds) -> Sampling:
        return self.sampling_with(
            limits,
            completion_tokens_max=self.max_tokens or COMPLETION_TOKENS_DEFAULT,
            logprobs=self.logprobs,
            echo=bool(self.echo),
        )


def request_of(body: CompletionRequest, request_id: str, limits: RequestBounds) -> InferenceRequest:
    """The body in the gateway's terms. Raises InvalidRequest beyond the installation's bounds."""
    return InferenceRequest(
        request_id=request_id,
        model=body.model,
        prompt=body.texts(limits),
        sampling=body.sampling(limits),
        collect=not body.stream,
        completion_tokens_asked=body.max_tokens,
    )


class CompletionFormat:
    """Writes text_completion objects. A streamed object has the same fields as a complete one."""

    def __init__(self) -> None:
        # By choice: how many characters its log-probabilities have covered.
        self._offsets: dict[int, int] = {}

    def opening_choices(self, result: GenerationResult) -> Iterable[Json]:
        return ()

    def streamed_choice(self, delta: Delta) -> Json:
        offset = self._offsets.get(delta.index, 0)
        self._offsets[delta.index] = offset + sum(len(logprob.token) for logprob in delta.logprobs)
        return _json(delta, _logprobs(delta.logprobs, offset))

    def complete_choice(self, choice: Choice, result: GenerationResult) -> Json:
        return _json(choice, _logprobs(choice.logprobs, 0))

    def envelope(self, result: GenerationResult, choices: list[Json], *, streamed: bool) -> Json:
        return {
            "id": "cmpl-" + result.request.request_id.removeprefix("req_"),
            "object": "text_completion",
            "created": int(result.created_at.timestamp()),
            "model": result.model,
            "choices": choices,
        }


def _json(choice: Delta | Choice, logprobs: Json | None) -> Json:
    return {
        "index": choice.index,
        "text": choice.text,
        "logprobs": logprobs,
        "finish_reason": choice.finish_reason,
    }


def _logprobs(tokens: Sequence[TokenLogprob], offset: int) -> Json | None:
    """The `logprobs` object of `tokens`, which begin at the choice's character `offset`."""
    if not tokens:
        return None
    ends = list(accumulate((len(token.token) for token in tokens), initial=offset))
    return {
        "tokens": [token.token for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [dict(token.top) if token.logprob is not None else None for token in tokens],
        "text_offset": ends[:-1],
    }
