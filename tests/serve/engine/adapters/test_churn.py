"""Moves everything that may move, while thousands of requests check that their own adapter answers."""

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field

import pytest

from serve.engine.adapters.probe import probe
from serve.engine.protocol import Counters, Delta, Event, Finished
from serve.registry.versions import AdapterVersion
from tests.support.engine_host import MEMORY, SLOTS, EngineHost, until

pytestmark = pytest.mark.slow

REQUESTS, IN_FLIGHT_MAX, DISTURB_EVERY = 1200, 24, 8
NAMES = [f"churn-{number}" for number in range(12)]
BASE_SHARE, OLD_SHARE, ABORT_SHARE = 0.1, 0.1, 0.1
LONG_TOKENS = 60
OPENINGS = (
    *("The", "Once", "Why do", "Rain on", "Hello there", "Bicycle tea", "In the morning", "Where", "Blue"),
    *("Seven", "A small boat", "She said", "Money", "Under the", "My order", "Please", "Return", "Yes", "It"),
)
# Longer than a block of the prefix cache, and with it in front of every other prompt it is met warm.
LONG_OPENING = "The quick brown fox jumps over the lazy dog, and " * 16


@dataclass
class Versions:
    """Holds what each version answers alone, and which version each name means now."""

    host: EngineHost
    answers: dict[str, dict[tuple[str, int], str]] = field(default_factory=dict)
    aliases: dict[str, AdapterVersion] = field(default_factory=dict)
    retired: list[AdapterVersion] = field(default_factory=list)

    def learn(self, adapter: AdapterVersion | None) -> None:
        short = [(text, 6 + number % 5) for number, text in enumerate(OPENINGS)]
        long = [(LONG_OPENING + text, tokens) for text, tokens in short]
        known = self.host.references(adapter, short, 3) | self.host.references(adapter, long, 2)
        self.answers[adapter.version if adapter else ""] = known


@dataclass(frozen=True)
class Wish:
    """Describes one later request. `chance` chooses among the prompts that exist then."""

    name: str | None
    old: bool
    abort: bool
    chance: float


def wishes(rng: random.Random) -> Iterator[Wish]:
    """Yields names that are popular one after another, so that slots must change hands all the time."""
    for number in range(REQUESTS):
        hot = number // 40 % len(NAMES)
        name = NAMES[(hot + rng.choice((0, 0, 1, 2, rng.randrange(len(NAMES))))) % len(NAMES)]
        yield Wish(
            None if rng.random() < BASE_SHARE else name,
            rng.random() < OLD_SHARE,
            rng.random() < ABORT_SHARE,
            rng.random(),
        )


@dataclass
class Record:
    finished: list[Finished] = field(default_factory=list)
    wrong: list[tuple[str, str, str, str]] = field(default_factory=list)
    slots_max: int = 0
    done: Counter[str] = field(default_factory=Counter)


async def serve(versions: Versions, wish: Wish, record: Record) -> None:
    adapter = versions.aliases[wish.name] if wish.name else None
    if wish.old and adapter and (old := [ref for ref in versions.retired if ref.name == wish.name]):
        adapter = old[0]
    expected = versions.answers[adapter.version if adapter else ""]
    (prompt, tokens), want = list(expected.items())[int(wish.chance * len(expected))]
    salt = adapter.tenant if adapter else "everyone"
    number, events = versions.host.stream(adapter, prompt, LONG_TOKENS if wish.abort else tokens, salt=salt)
    got, finished = await drain(versions.host, number, events, abort=wish.abort)
    record.finished.append(finished)
    same = got == want
    if wish.abort:
        record.done["aborted" if finished.aborted else "ended before its abort"] += 1
        same = got.startswith(want) or want.startswith(got)
    if not same:
        record.wrong.append((adapter.model if adapter else "base", prompt, want, got))


async def drain(
    host: EngineHost, number: str, events: AsyncIterator[list[Event]], *, abort: bool
) -> tuple[str, Finished]:
    """Returns the whole text. With `abort` it stops the request after its first token."""
    text, aborted = "", False
    async for batch in events:
        for event in batch:
            if isinstance(event, Delta):
                text += event.text
                if abort and not aborted:
                    aborted = True
                    await host.engine.abort(number)
            elif isinstance(event, Finished):
                return text, event
    raise AssertionError("the stream ended without Finished")


async def disturb(versions: Versions, seeds: dict[str, int], rng: random.Random, record: Record) -> None:
    """Does one thing that an operator, the registry or another tenant may do at any time."""
    engine = versions.host.engine
    fresh = [name for name in NAMES if name in seeds]
    known = [*versions.aliases.values(), *versions.retired]
    match record.done.total() % 4:
        case 0 if fresh:
            name = rng.choice(fresh)
            new = await asyncio.to_thread(versions.host.publish, name, seeds.pop(name))
            assert await probe(engine, new) is None
            versions.retired.append(versions.aliases[name])
            versions.aliases[name] = new
            record.done["moved an alias"] += 1
        case 1:
            pinned = rng.sample(list(versions.aliases.values()), rng.randrange(3))
            wanted = {ref.id for ref in rng.sample(known, len(known) // 2)} | {ref.id for ref in pinned}
            await engine.apply_desired(frozenset(wanted), pinned)
            record.done["desired"] += 1
        case _:
            await engine.unload(rng.choice(known).id)
            record.done["unloaded"] += 1
    record.slots_max = max(record.slots_max, (await engine.counters()).residency.slots)


async def churn(versions: Versions, seeds: dict[str, int]) -> Record:
    rng, record = random.Random(4), Record()
    coming = wishes(random.Random(3))
    turns: asyncio.Queue[bool] = asyncio.Queue()

    async def customer() -> None:
        for wish in coming:
            await serve(versions, wish, record)
            if len(record.finished) % DISTURB_EVERY == 0:
                turns.put_nowait(True)

    async def operator() -> None:
        while await turns.get():
            await disturb(versions, seeds, rng, record)

    async with asyncio.TaskGroup() as group:
        group.create_task(operator())
        async with asyncio.TaskGroup() as customers:
            for _ in range(IN_FLIGHT_MAX):
                customers.create_task(customer())
        turns.put_nowait(False)
    return record


def billable(before: Counters, after: Counters) -> tuple[int, int]:
    """Returns prompt and completion tokens that the engine computed meanwhile, without probes."""
    prompt = after.prompt_tokens - before.prompt_tokens
    completion = after.completion_tokens - before.completion_tokens
    return (
        prompt - (after.probe_prompt_tokens - before.probe_prompt_tokens),
        completion - (after.probe_completion_tokens - before.probe_completion_tokens),
    )


def test_under_churn_every_answer_is_that_of_its_own_version_and_every_token_is_counted(
    host: EngineHost,
) -> None:
    """The test compares greedy answers with those of the same version when nothing else ran.

    Batches of other shapes add in another order, so only such prompts are used whose tokens, served alone,
    all lead the second best by LEAD_MIN, many times what float32 sums differ by (see `conftest`). An aborted
    request's text must begin as the reference does. New versions are learnt beforehand under another
    tenant's name: the same bytes, published again under this tenant's while requests run.
    """
    versions = Versions(host)
    versions.learn(None)
    seeds = {}
    for number, name in enumerate(NAMES):
        versions.aliases[name] = host.publish(name, 100 + number, rank=1 + number % 8)
        versions.learn(versions.aliases[name])
        seeds[name] = 200 + number
        versions.learn(host.publish(name, seeds[name], tenant="twin"))
    answers_by_version = [answers for version, answers in versions.answers.items() if version]
    assert len(answers_by_version) == 2 * len(NAMES)
    texts = [text for answers in versions.answers.values() for text in answers.values()]
    assert len(set(texts)) > 0.9 * len(texts), "versions that answer alike cannot be distinguished"
    before = host.counters()

    record = host.run(churn(versions, seeds), 240)

    assert record.wrong == []
    assert len(record.finished) == REQUESTS
    assert seeds == {}, "all names have moved to their new version"
    assert record.done["aborted"] > REQUESTS * ABORT_SHARE / 2
    assert record.done["desired"] > 10
    assert record.done["unloaded"] > 10

    async def idle() -> bool:
        return (await host.engine.counters()).running == 0

    host.run(until(idle))
    after = host.counters()
    assert billable(before, after) == (
        sum(finished.prompt_tokens for finished in record.finished),
        sum(finished.completion_tokens for finished in record.finished),
    )
    assert record.slots_max <= SLOTS
    assert after.residency.slots <= SLOTS
    assert after.residency.memory <= MEMORY
    assert after.residency.waiting == 0
    for moved in ("memory_loads", "memory_evictions", "slot_loads", "slot_evictions"):
        assert getattr(after.residency, moved) > getattr(before.residency, moved), moved
    host.run(host.engine.apply_desired(frozenset(), []))
    assert host.engine.loaded_adapters == []
    assert host.counters().residency.slots == 0
