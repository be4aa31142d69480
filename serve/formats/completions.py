"""Translates text completions: the body into an InferenceRequest, the answer into text_completion objects.

platform.openai.com/docs/api-reference/completions.
"""

from collections.abc import Iterable
from typing import Any, ClassVar

from pydantic import Field, field_validator, model_validator

from serve.engine.protocol import Delta, Sampling, Texts
from serve.errors import InvalidRequest
from serve.formats.body_budget import Items
from serve.formats.bounds import bound
from serve.formats.logprobs import characters, text_logprobs
from serve.formats.response_format import Json
from serve.formats.sampling import CHOICES_MAX, GenerationBody, RequestBounds, TokenIds
from serve.inference.answer import Choice
from serve.inference.request import GenerationResult, InferenceRequest

COMPLETION_TOKENS_DEFAULT = 16  # OpenAI's


class CompletionRequest(GenerationBody):
    HARMLESS: ClassVar[dict[str, tuple[Any, ...]]] = {"add_special_tokens": (True,)}

    max_tokens: int | None = Field(None, ge=0)
    prompt: str | Items[str] | TokenIds | Items[TokenIds]
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
    def _consistent(self) -> "CompletionRequest":
        self.check_constraints((), None)
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
            completion_tokens_max=COMPLETION_TOKENS_DEFAULT if self.max_tokens is None else self.max_tokens,
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
        self._likeliest = 0

    def opening_choices(self, result: GenerationResult) -> Iterable[Json]:
        self._likeliest = result.request.sampling.logprobs or 0
        return ()

    def streamed_choice(self, delta: Delta) -> Json:
        offset = self._offsets.get(delta.index, 0)
        self._offsets[delta.index] = offset + sum(characters(each.token) for each in delta.logprobs)
        logprobs = text_logprobs(delta.logprobs, offset, self._likeliest) if delta.logprobs else None
        return _json(delta, logprobs)

    def complete_choice(self, choice: Choice, result: GenerationResult) -> Json:
        likeliest = result.request.sampling.logprobs
        return _json(choice, None if likeliest is None else text_logprobs(choice.logprobs, 0, likeliest))

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
