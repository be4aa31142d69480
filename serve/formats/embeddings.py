"""Translates embeddings: the body into an InferenceRequest, the vectors into OpenAI's list of objects.

platform.openai.com/docs/api-reference/embeddings. Of vLLM's fields, `truncate_prompt_tokens` is taken.
"""

import base64
from array import array
from typing import Any, Literal

import msgspec
from pydantic import BaseModel, Field, field_validator, model_validator

from serve.engine.protocol import EMBEDDING_TOKENS_MAX, Pooling, Sampling, Texts
from serve.errors import InvalidRequest
from serve.formats.body_budget import Items
from serve.formats.bounds import bound
from serve.formats.response_format import Json
from serve.formats.sampling import RequestBounds, TokenIds, refuse
from serve.inference.answer import Choice
from serve.inference.request import GenerationResult, InferenceRequest

INPUTS_MAX = 2048  # OpenAI's
# vLLM's fields that would make another vector, each with the values that change nothing.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "embed_dtype": ("float32",),
    "endianness": ("native", "little"),
    "messages": (),
    "normalize": (True,),
    "truncation_side": ("right",),
    "use_activation": (True,),
}


class EmbeddingRequest(BaseModel):
    model: str = Field(min_length=1, max_length=160)
    input: str | Items[str] | TokenIds | Items[TokenIds]
    dimensions: int | None = Field(None, ge=1, le=1 << 16)
    encoding_format: Literal["float", "base64"] | None = None
    # Fewer than three tokens leave nothing between the two that stand around a text.
    truncate_prompt_tokens: int | None = Field(None, ge=-1, le=2**31 - 1)
    user: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, data: Any) -> Any:
        if isinstance(data, dict):
            taken = ("truncate_prompt_tokens", "truncation_side")
            refuse({k: v for k, v in data.items() if k not in taken}, {"add_special_tokens": (True,)})
            for name in sorted(data.keys() & _UNSUPPORTED.keys()):
                if data[name] is not None and data[name] not in _UNSUPPORTED[name]:
                    text = f"The parameter '{name}' is not supported with this value."
                    raise InvalidRequest(text, name, "unsupported_parameter")
        return data

    @field_validator("input")
    @classmethod
    def _input_not_empty(cls, value: Any) -> Any:
        if not value or (isinstance(value, list) and any(entry in ("", []) for entry in value)):
            raise ValueError("the input is empty, or holds an empty text")
        return value

    @field_validator("truncate_prompt_tokens")
    @classmethod
    def _truncation_leaves_something(cls, value: int | None) -> int | None:
        if value is not None and 0 <= value < 3:
            raise ValueError("it is at least 3, or -1 for the model's context")
        return value

    def texts(self) -> Texts:
        """Raises InvalidRequest for more inputs, or more token ids, than a request may have."""
        given: Any = self.input
        entries = given if isinstance(given, list) and not isinstance(given[0], int) else [given]
        bound("input", len(entries), INPUTS_MAX, "inputs")
        tokens = sum(len(entry) for entry in entries if not isinstance(entry, str))
        bound("input", tokens, EMBEDDING_TOKENS_MAX, "tokens over all inputs")
        return Texts(tuple(entry if isinstance(entry, str) else tuple(entry) for entry in entries))


def request_of(body: EmbeddingRequest, request_id: str, limits: RequestBounds) -> InferenceRequest:
    """The body in the gateway's terms. Raises InvalidRequest."""
    return InferenceRequest(
        request_id=request_id,
        model=body.model,
        prompt=body.texts(),
        sampling=Sampling(completion_tokens_max=0),
        collect=True,
        pooling=Pooling(body.dimensions, body.truncate_prompt_tokens),
        base64=body.encoding_format == "base64",
    )


class EmbeddingFormat:
    """Writes the list of embeddings."""

    def complete_choice(self, choice: Choice, result: GenerationResult) -> Json:
        vector: Any
        if result.request.base64:
            vector = base64.b64encode(choice.embedding).decode()
        else:
            # Each vector is encoded on its own, so that a thread lets others run in between.
            vector = msgspec.Raw(msgspec.json.encode(_numbers(choice.embedding)))
        return {"object": "embedding", "index": choice.index, "embedding": vector}

    def envelope(self, result: GenerationResult, choices: list[Json], *, streamed: bool) -> Json:
        tokens = result.tokens.prompt
        return {
            "object": "list",
            "data": choices,
            "model": result.model,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }


def _numbers(embedding: bytes) -> list[float]:
    numbers = array("f")
    numbers.frombytes(embedding)  # both little-endian: Bespoke runs on x86-64
    return numbers.tolist()
