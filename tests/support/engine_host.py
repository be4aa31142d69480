"""A real engine on the tiny base, with two slots and memory for four adapters, on CPU."""

import asyncio
import itertools
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from loadtests.synthetic import publish_random
from serve.engine.protocol import (
    Counters,
    Delta,
    Event,
    Finished,
    GenerationRequest,
    Sampling,
    Texts,
)
from serve.engine.vllm.engine import VllmEngine
from serve.registry.versions import AdapterVersion
from serve.settings import EngineSettings
from tests.support.constants import TENANTS

T = TypeVar("T")
Prompt = tuple[str, int]  # a text, and how many tokens to continue it with

TENANT = TENANTS[0]
SLOTS, MEMORY, RANK_MAX = 2, 4, 8
# A tiny random model needs large weights before an adapter changes most of its tokens.
SIZE = 0.5
# float32 sums of a few hundred terms differ by about 1e-5 with their order, all that a batch changes.
# A token that leads by a hundred times that, when its version is alone, leads in every batch.
LEAD_MIN = 1e-3
SETTINGS = EngineSettings(
    dtype="float32",
    max_model_len=1024,
    max_loras=SLOTS,
    max_cpu_loras=MEMORY,
    max_lora_rank=RANK_MAX,
    enforce_eager=True,
    slot_patience_s=0.1,
)

_numbers = itertools.count(1)


class EventLoopThread:
    """Runs an event loop in a thread: an engine belongs to the loop that it was started on."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T], timeout_s: float = 120) -> T:
        """The result of `work`, which is cancelled if it takes longer."""
        return asyncio.run_coroutine_threadsafe(asyncio.wait_for(work, timeout_s), self._loop).result()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()


async def events_of(engine: VllmEngine, request: GenerationRequest) -> AsyncIterator[list[Event]]:
    """Yields the engine's batches one after another. Closing it ends the request."""
    batches: asyncio.Queue[list[Event]] = asyncio.Queue()
    generating = asyncio.create_task(engine.generate(request, batches.put_nowait))
    try:
        while not (generating.done() and batches.empty()):
            coming = asyncio.create_task(batches.get())
            await asyncio.wait({coming, generating}, return_when=asyncio.FIRST_COMPLETED)
            if coming.done():
                yield coming.result()
            coming.cancel()
        await generating
    finally:
        generating.cancel()
        await asyncio.wait({generating})


@dataclass
class EngineHost:
    """Holds a running engine, and publishes adapters for it under ids that no other test uses."""

    engine: VllmEngine
    loop: EventLoopThread
    base_dir: Path
    adapters_dir: Path

    def publish(
        self, name: str, seed: int, *, rank: int = 4, size: float = SIZE, **more: Any
    ) -> AdapterVersion:
        more.setdefault("tenant", TENANT)
        path = publish_random(
            self.base_dir, self.adapters_dir, name=name, seed=seed, rank=rank, size=size, **more
        )
        return self.ref(name, path.name, more["tenant"])

    def ref(self, name: str, version: str, tenant: str = TENANT) -> AdapterVersion:
        return AdapterVersion(next(_numbers), tenant, name, version)

    def run(self, work: Coroutine[Any, Any, T], timeout_s: float = 120) -> T:
        return self.loop.run(work, timeout_s)

    def stream(
        self, adapter: AdapterVersion | None, prompt: str, tokens: int, *, salt: str | None = None
    ) -> tuple[str, AsyncIterator[list[Event]]]:
        """The id of a greedy request, and its events. Without a `salt` it shares nobody's prefix cache."""
        request_id = f"request-{next(_numbers)}"
        sampling = Sampling(completion_tokens_max=tokens, temperature=0.0)
        request = GenerationRequest(request_id, adapter, Texts((prompt,)), sampling, salt or request_id)
        return request_id, events_of(self.engine, request)

    async def answer(
        self, adapter: AdapterVersion | None, prompt: str, tokens: int = 8, *, salt: str | None = None
    ) -> "Answer":
        answer = await collect(self.stream(adapter, prompt, tokens, salt=salt)[1])
        assert answer.tokens == answer.finished.completion_tokens
        return answer

    def ask(
        self, adapter: AdapterVersion | None, prompt: str, tokens: int = 8, *, salt: str | None = None
    ) -> "Answer":
        return self.run(self.answer(adapter, prompt, tokens, salt=salt))

    async def sure(self, adapter: AdapterVersion | None, prompt: str, tokens: int) -> tuple[str, float]:
        """Returns what `adapter` answers alone, and the least lead of a token over the second best."""
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        number = f"sure-{next(_numbers)}"
        params = SamplingParams(
            temperature=0.0, max_tokens=tokens, logprobs=2, output_kind=RequestOutputKind.FINAL_ONLY
        )
        request = {"prompt_token_ids": self.engine._renderer.tokenizer.encode(prompt), "cache_salt": number}
        async with self.engine._lora(adapter) as lora:
            async for output in self.engine._llm.generate(request, params, number, lora_request=lora):
                (choice,) = output.outputs
                ranked = [sorted((e.logprob for e in top.values()), reverse=True) for top in choice.logprobs]
                return choice.text, min(best - second for best, second, *_ in ranked)
        raise AssertionError("no output")

    def references(
        self, adapter: AdapterVersion | None, candidates: list[Prompt], count: int
    ) -> dict[Prompt, str]:
        """Returns the first `count` candidates that `adapter` alone answers with sure tokens, and answers."""
        answers: dict[Prompt, str] = {}
        for prompt, tokens in candidates:
            text, lead = self.run(self.sure(adapter, prompt, tokens))
            if lead > LEAD_MIN:
                answers[prompt, tokens] = text
            if len(answers) == count:
                return answers
        raise AssertionError(f"only {len(answers)} of {len(candidates)} prompts have answers that are sure")

    def counters(self) -> Counters:
        return self.run(self.engine.counters())


@dataclass(frozen=True)
class Answer:
    text: str
    tokens: int
    finished: Finished


async def collect(stream: AsyncIterator[list[Event]]) -> Answer:
    """Reads the rest of a stream: its text and its tokens."""
    text, tokens = "", 0
    async for batch in stream:
        for event in batch:
            if isinstance(event, Delta):
                text += event.text
                tokens += event.tokens
            elif isinstance(event, Finished):
                return Answer(text, tokens, event)
    raise AssertionError("the stream ended without Finished")


async def until(condition: Callable[[], Coroutine[Any, Any, bool]], timeout_s: float = 30) -> None:
    """Fails the test if `condition` does not come true in time."""
    async with asyncio.timeout(timeout_s):
        while not await condition():
            await asyncio.sleep(0.02)
