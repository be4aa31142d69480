"""vLLM's pooling runner makes MiniLM's vectors as their makers do, and counts what it reads."""

import asyncio
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serve.engine.protocol import (
    Accepted,
    Delta,
    Event,
    Finished,
    GenerationRequest,
    Pooling,
    Sampling,
    Texts,
)
from serve.engine.vllm.pooling import PoolingEngine
from serve.errors import ContextLengthExceeded, InvalidRequest
from tests.support.constants import MINILM
from tests.support.embedding_samples import TRUNCATED, VECTORS
from tests.support.engine_host import SETTINGS, EventLoopThread
from tests.support.live_service import import_embedding_base

pytestmark = pytest.mark.slow

CONTEXT, SIZE = 256, 384
_numbers = itertools.count()


class Embedder:
    def __init__(self, engine: PoolingEngine, loop: EventLoopThread, base_dir: Path) -> None:
        self.engine, self.loop, self.base_dir = engine, loop, base_dir

    def events(self, texts: tuple[Any, ...], **pooling: Any) -> list[Event]:
        events: list[Event] = []
        self.loop.run(self.engine.generate(request_of(texts, **pooling), events.extend))
        return events

    def vectors(self, *texts: Any, **pooling: Any) -> np.ndarray:
        return np.array(
            [vector_of(event) for event in self.events(texts, **pooling) if isinstance(event, Delta)]
        )

    def read(self) -> int:
        """Prompt tokens that vLLM has counted, without those of the start's own check."""
        return self.loop.run(self.reading())

    async def reading(self) -> int:
        counters = await self.engine.counters()
        return counters.prompt_tokens - counters.probe_prompt_tokens


def request_of(texts: tuple[Any, ...], **pooling: Any) -> GenerationRequest:
    number, sampling = f"embedding-{next(_numbers)}", Sampling(completion_tokens_max=0)
    return GenerationRequest(number, None, Texts(texts), sampling, "salt", pooling=Pooling(**pooling))


def vector_of(delta: Delta) -> np.ndarray:
    return np.frombuffer(delta.embedding, "<f4")


@pytest.fixture(scope="module")
def embedder(loop: EventLoopThread, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Embedder]:
    home = tmp_path_factory.mktemp("home")
    base_dir = import_embedding_base(home)
    starting = PoolingEngine.start(MINILM, base_dir, home / "adapters", SETTINGS, "replica")
    engine = loop.run(starting, 300)
    yield Embedder(engine, loop, base_dir)
    engine.shutdown()


def test_vectors_are_those_of_sentence_transformers(embedder: Embedder) -> None:
    vectors = embedder.vectors(*VECTORS, truncate_tokens=-1)
    for vector, (text, (first, total)) in zip(vectors, VECTORS.items(), strict=True):
        assert vector[: len(first)] == pytest.approx(first, abs=2e-5), text
        assert vector.sum() == pytest.approx(total, abs=2e-3), text
        assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-5), text


def test_vectors_are_the_mean_of_the_tokens_vectors_that_transformers_computes(embedder: Embedder) -> None:
    import torch
    from transformers import AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(embedder.base_dir)
    tokenizer = AutoTokenizer.from_pretrained(embedder.base_dir)
    texts = ["Hello", "naïve café 🙂", " ", "x" * 2_000, "東京 Москва"]
    ours = embedder.vectors(*texts, truncate_tokens=-1)
    for vector, text in zip(ours, texts, strict=True):
        with torch.no_grad():
            tokens = tokenizer(text, return_tensors="pt", truncation=True, max_length=CONTEXT)
            mean = model(**tokens).last_hidden_state[0].mean(dim=0)
        expected = torch.nn.functional.normalize(mean, dim=0).numpy()
        assert np.abs(vector - expected).max() < 2e-5, text


def test_a_text_and_its_token_ids_have_one_vector_whatever_stands_beside_them(embedder: Embedder) -> None:
    tokenizer = embedder.engine._texts.tokenizer
    ids = tuple(tokenizer("The cat sat on the mat.")["input_ids"])
    (alone,) = embedder.vectors("The cat sat on the mat.")
    many = embedder.vectors(*["word " * number for number in range(1, 40)], ids, "Hello")
    assert np.abs(many[39] - alone).max() < 2e-5
    assert len(many) == 41


def test_what_is_read_is_counted_and_told_in_the_order_of_the_texts(embedder: Embedder) -> None:
    before = embedder.read()
    events = embedder.events(("Hello", (101, 7592, 102), "two words"))
    accepted, *deltas, finished = events
    assert isinstance(accepted, Accepted)
    assert [delta.index for delta in deltas if isinstance(delta, Delta)] == [0, 1, 2]
    assert accepted.prompt_tokens == 3 + 3 + 4
    assert finished == Finished(10, 0, 0, aborted=False)
    assert embedder.read() - before == 10


@pytest.mark.parametrize("dimensions", [1, 8, 256, SIZE])
def test_fewer_dimensions_are_the_first_ones_made_as_long_again(embedder: Embedder, dimensions: int) -> None:
    (whole,) = embedder.vectors("Hello")
    (short,) = embedder.vectors("Hello", dimensions=dimensions)
    first = whole[:dimensions].astype(np.float64)
    assert short == pytest.approx(first / np.linalg.norm(first), abs=1e-6)


def test_a_text_that_the_context_cannot_hold_is_refused_by_its_place_unless_it_may_be_cut(
    embedder: Embedder,
) -> None:
    before = embedder.read()
    with pytest.raises(ContextLengthExceeded) as refused:
        embedder.events(("Hello", TRUNCATED))
    assert refused.value.param == "input.1"
    with pytest.raises(InvalidRequest) as too_much:
        embedder.events(("Hello",), truncate_tokens=CONTEXT + 1)
    assert too_much.value.param == "truncate_prompt_tokens"
    assert embedder.read() == before
    cut = embedder.events((TRUNCATED,), truncate_tokens=8)
    assert cut[-1] == Finished(8, 0, 0, aborted=False)
    assert np.array_equal(embedder.vectors(TRUNCATED, truncate_tokens=8), embedder.vectors("a b a b a b"))


@pytest.mark.parametrize("ids", [(30_522,), (101, 2**31 - 1)])
def test_a_token_that_the_model_has_not_is_refused(embedder: Embedder, ids: tuple[int, ...]) -> None:
    with pytest.raises(InvalidRequest) as refused:
        embedder.events(("Hello", ids))
    assert refused.value.param == "input.1"
    assert embedder.vectors("still there").shape == (1, SIZE)


def test_a_prompt_of_messages_is_refused(embedder: Embedder) -> None:
    request = GenerationRequest("chat", None, Texts(("Hello",)), Sampling(1), "salt")
    with pytest.raises(InvalidRequest, match="makes embeddings"):
        embedder.loop.run(embedder.engine.generate(request, lambda events: None))


def test_a_client_that_leaves_ends_its_request_and_what_was_read_is_counted(embedder: Embedder) -> None:
    before = embedder.read()
    request = request_of(("word " * 250,) * 400)

    async def leave() -> int:
        running = asyncio.create_task(embedder.engine.generate(request, lambda events: None))
        while await embedder.reading() == before:
            await asyncio.sleep(0.01)
        running.cancel()
        await asyncio.wait({running})
        usage = await embedder.engine.final_usage(request.request_id)
        assert usage is not None
        return usage.tokens.prompt

    counted = embedder.loop.run(leave())
    assert counted == embedder.read() - before < 400 * 252
    assert embedder.vectors("next").shape == (1, SIZE)
