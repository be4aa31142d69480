"""POST /v1/completions — platform.openai.com/docs/api-reference/completions."""

from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from serve.engine.protocol import Delta, Sampling, Texts, TokenLogprob
from serve.errors import InvalidRequest
from serve.formats.bounds import bound
from serve.formats.sampling import CHOICES_MAX, GenerationBody, RequestBounds
from serve.formats.shape import Json
from serve.inference.request import Choice, GenerationResult, InferenceRequest

TokenId = Annotated[int, Field(ge=0, lt=2**31)]
COMPLETION_TOKENS_DEFAULT = 16  # OpenAI's


class CompletionRequest(GenerationBody):
    prompt: str | list[str] | list[TokenId] | list[list[TokenId]]
    logprobs: int | None = Field(None, ge=0, le=5)
    echo: bool | None = None
    best_of: int | None = Field(None, ge=1)

    @field_validator("prompt")
    @classmethod
    def _prompt_not_empty(cls, prompt: Any) -> Any:
        if not prompt or (isinstance(prompt, list) and any(one in ("", []) for one in prompt)):
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
        return Texts(tuple(one if isinstance(one, str) else tuple(one) for one in prompt))

    def sampling(self, limits: RequestBounds) -> Sampling:
        return self.sampling_with(
            limits,
            completion_tokens_max=self.max_tokens or COMPLETION_TOKENS_DEFAULT,
            length_param="max_tokens",
            logprobs=self.logprobs,
            echo=bool(self.echo),
        )


def request_of(body: CompletionRequest, request_id: str, limits: RequestBounds) -> InferenceRequest:
    """Raises InvalidRequest for what is beyond the installation's bounds."""
    return InferenceRequest(
        request_id=request_id,
        model=body.model,
        prompt=body.texts(limits),
        sampling=body.sampling(limits),
        length_param="max_tokens",
        collect=not body.stream,
    )


class CompletionFormat:
    """text_completion objects; a streamed one has the same shape as a whole one."""

    def __init__(self) -> None:
        self._offsets: dict[
            int, int
        ] = {}  # by choice: how many characters its log-probabilities have covered

    def opening(self, result: GenerationResult) -> Iterable[Json]:
        return ()

    def choice(self, delta: Delta) -> Json:
        at = self._offsets.get(delta.index, 0)
        self._offsets[delta.index] = at + sum(len(one.token) for one in delta.logprobs)
        return _json(delta, _logprobs(delta.logprobs, at))

    def whole(self, choice: Choice, result: GenerationResult) -> Json:
        return _json(choice, _logprobs(choice.logprobs, 0))

    def envelope(self, result: GenerationResult, choices: list[Json], *, streamed: bool) -> Json:
        return {
            "id": "cmpl-" + result.request.request_id.removeprefix("req_"),
            "object": "text_completion",
            "created": int(result.created_at.timestamp()),
            "model": result.model,
            "choices": choices,
        }


def _json(one: Delta | Choice, logprobs: Json | None) -> Json:
    return {
        "index": one.index,
        "text": one.text,
        "logprobs": logprobs,
        "finish_reason": one.finish_reason,
    }


def _logprobs(tokens: Sequence[TokenLogprob], at: int) -> Json | None:
    """`at`: how many characters of the choice come before `tokens`."""
    if not tokens:
        return None
    ends = list(accumulate((len(one.token) for one in tokens), initial=at))
    return {
        "tokens": [one.token for one in tokens],
        "token_logprobs": [one.logprob for one in tokens],
        "top_logprobs": [dict(one.top) if one.logprob is not None else None for one in tokens],
        "text_offset": ends[:-1],
    }
