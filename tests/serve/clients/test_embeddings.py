"""OpenAI's client makes embeddings as it does with OpenAI: whole, shortened, in batches; all is billed."""

import base64
import json
from struct import unpack
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from serve.billing.pricing.plans import Tokens
from tests.support.constants import MINILM, PLAN, TENANTS
from tests.support.embedding_samples import TRUNCATED, VECTORS
from tests.support.live_service import LiveService, run_batch

pytestmark = pytest.mark.slow

SIZE = 384


def raw(live: LiveService, **fields: Any) -> Any:
    headers = {"Authorization": f"Bearer {live.keys[TENANTS[0]]}"}
    body = {"model": MINILM, "input": "Hello"} | fields
    return httpx.post(f"{live.url}/v1/embeddings", json=body, headers=headers, timeout=60).json()


@pytest.mark.compatibility("OpenAI (Python)", "embeddings")
def test_the_clients_vectors_are_those_of_sentence_transformers_and_are_billed(live: LiveService) -> None:
    live.wait_idle()
    texts = [text for text in VECTORS if text != TRUNCATED]
    made = live.client().embeddings.create(model=MINILM, input=texts)
    assert (made.model, [one.index for one in made.data]) == (MINILM, list(range(len(texts))))
    for one, text in zip(made.data, texts, strict=True):
        first, total = VECTORS[text]
        assert one.embedding[: len(first)] == pytest.approx(first, abs=2e-5)
        assert sum(one.embedding) == pytest.approx(total, abs=2e-3)
    event = live.last_event()
    tokens = made.usage.prompt_tokens
    assert (event["model"], event["prompt_tokens"], event["completion_tokens"]) == (MINILM, tokens, 0)
    assert event["cost_nanos"] == PLAN.rates(model=MINILM, adapter=False).cost_nanos(Tokens(tokens, 0, 0)) > 0
    live.assert_reconciled()


@pytest.mark.compatibility("OpenAI (Python)", "embeddings of fewer dimensions")
def test_dimensions_and_both_encodings_agree(live: LiveService) -> None:
    whole = np.array(live.client().embeddings.create(model=MINILM, input="Hello").data[0].embedding)
    short = live.client().embeddings.create(model=MINILM, input="Hello", dimensions=64).data[0].embedding
    assert short == pytest.approx(whole[:64] / np.linalg.norm(whole[:64]), abs=1e-6)
    text = raw(live, encoding_format="base64")["data"][0]["embedding"]
    numbers = raw(live, encoding_format="float")["data"][0]["embedding"]
    assert list(unpack(f"<{SIZE}f", base64.b64decode(text))) == pytest.approx(numbers, abs=1e-7)


def test_what_cannot_be_embedded_is_refused_by_name_and_not_billed(live: LiveService) -> None:
    live.wait_idle()
    events = live.count_events()
    for fields, param, code in (
        ({"input": ["Hello", TRUNCATED]}, "input.1", "context_length_exceeded"),
        ({"input": []}, "input", "invalid_value"),
        ({"input": [40_000]}, "input", "invalid_value"),
        ({"dimensions": SIZE + 1}, "dimensions", "invalid_value"),
    ):
        error = raw(live, **fields)["error"]
        assert (error["param"], error["code"]) == (param, code)
    with pytest.raises(openai.BadRequestError, match="generates no text"):
        live.client().chat.completions.create(model=MINILM, messages=[{"role": "user", "content": "Hi"}])
    live.wait_idle()
    assert live.count_events() == events


@pytest.mark.compatibility("OpenAI (Python)", "embeddings in batches")
def test_a_batch_of_embeddings_gives_the_vectors_that_a_request_gives(live: LiveService) -> None:
    client = live.client()
    bodies = [
        {"model": MINILM, "input": text, "encoding_format": "float"}
        for text in ("Hello", ["Hello", "The cat sat on the mat."])
    ]
    output = run_batch(client, "/v1/embeddings", bodies).output_file_id
    assert output is not None
    answers = {
        answer["custom_id"]: answer["response"]["body"]
        for answer in map(json.loads, client.files.content(output).text.splitlines())
    }
    hello = client.embeddings.create(model=MINILM, input="Hello").data[0].embedding
    assert answers["line-0"]["data"][0]["embedding"] == pytest.approx(hello, abs=2e-5)
    assert answers["line-1"]["data"][0]["embedding"] == pytest.approx(hello, abs=2e-5)
    assert len(answers["line-1"]["data"]) == 2
    live.wait_idle()
    live.assert_reconciled()
