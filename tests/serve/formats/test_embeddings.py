"""Embedding bodies are bounded before work begins, and vectors are written as the client asks for them."""

import base64
import json
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.billing.pricing.plans import Tokens
from serve.engine.protocol import Delta, Pooling, Texts
from serve.errors import InvalidRequest
from serve.formats.embeddings import INPUTS_MAX, EmbeddingFormat, EmbeddingRequest, request_of
from serve.formats.response_format import complete_body, dumps
from serve.formats.sampling import parse
from serve.inference.answer import CollectedAnswer
from serve.inference.request import GenerationResult, InferenceRequest
from tests.support.batching import FIELDS
from tests.support.constants import NOON


def read(**fields: Any) -> InferenceRequest:
    body = parse(EmbeddingRequest, json.dumps({"model": "m", "input": "a"} | fields).encode())
    return request_of(body, "req_1", FIELDS)


@pytest.mark.parametrize(
    ("given", "texts"),
    [
        ("a", ("a",)),
        (["a", " "], ("a", " ")),
        ([1, 2], ((1, 2),)),
        ([[1], [2, 3]], ((1,), (2, 3))),
        (["a"] * INPUTS_MAX, ("a",) * INPUTS_MAX),
    ],
)
def test_an_input_is_a_text_token_ids_or_a_list_of_them(given: Any, texts: tuple[Any, ...]) -> None:
    request = read(input=given)
    assert request.prompt == Texts(texts)
    assert request.choices == len(texts)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": ["a", ""]}, "input"),
        ({"input": [[1], []]}, "input"),
        ({"input": None}, "input"),
        ({"input": {"text": "a"}}, "input"),
        ({"input": ["a", 1]}, "input"),
        ({"input": [-1]}, "input"),
        ({"input": [1.5]}, "input"),
        ({"input": ["a"] * (INPUTS_MAX + 1)}, "input"),
        ({"dimensions": 0}, "dimensions"),
        ({"dimensions": "8"}, "dimensions"),
        ({"encoding_format": "int8"}, "encoding_format"),
        ({"truncate_prompt_tokens": 2}, "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": 8, "truncation_side": "left"}, "truncation_side"),
        ({"normalize": False}, "normalize"),
        ({"use_activation": False}, "use_activation"),
        ({"embed_dtype": "float16"}, "embed_dtype"),
        ({"endianness": "big"}, "endianness"),
        ({"messages": [{"role": "user", "content": "a"}]}, "messages"),
        ({"add_special_tokens": False}, "add_special_tokens"),
        ({"cache_salt": "x"}, "cache_salt"),
        ({"priority": 1}, "priority"),
    ],
)
def test_a_body_that_breaks_a_rule_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read(**fields)
    assert (caught.value.param or "").split(".")[0] == param


def test_fields_that_change_nothing_are_taken() -> None:
    request = read(
        **{"user": "u", "encoding_format": None, "dimensions": None, "add_special_tokens": True},
        **{"normalize": True, "embed_dtype": "float32", "truncation_side": "right", "priority": 0, "new": 1},
    )
    assert (request.pooling, request.base64) == (Pooling(), False)


def result_of(request: InferenceRequest, *vectors: tuple[float, ...]) -> GenerationResult:
    answer = CollectedAnswer(len(vectors))
    for part, vector in enumerate(vectors):
        packed = struct.pack(f"<{len(vector)}f", *vector)
        answer.take([Delta(part, "", 0, "stop", embedding=packed)])
    return GenerationResult(request, "m", NOON, Tokens(7, 0, 0), answer.choices)


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=8))
def test_numbers_and_base64_are_the_same_vector(vector: list[float]) -> None:
    floats, packed = (
        json.loads(
            dumps(complete_body(result_of(read(encoding_format=form), tuple(vector)), EmbeddingFormat()))
        )
        for form in ("float", "base64")
    )
    (number_object,), (text_object,) = floats["data"], packed["data"]
    assert number_object["embedding"] == vector
    assert list(struct.unpack(f"<{len(vector)}f", base64.b64decode(text_object["embedding"]))) == vector


def test_an_answer_has_openais_shape() -> None:
    body = complete_body(result_of(read(input=["a", "b"]), (0.5,), (0.25,)), EmbeddingFormat())
    assert json.loads(dumps(body)) == {
        "object": "list",
        "data": [
            {"object": "embedding", "index": 0, "embedding": [0.5]},
            {"object": "embedding", "index": 1, "embedding": [0.25]},
        ],
        "model": "m",
        "usage": {"prompt_tokens": 7, "total_tokens": 7},
    }
