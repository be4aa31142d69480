"""Checks defects that vLLM's users reported, in this engine. Numbers are vLLM's issues."""

import asyncio
import shutil
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from finetune.card import CARD_NAME, WEIGHTS_NAME, content_version, read_card, write_card
from finetune.hashing import file_sha256
from serve.engine.adapters.probe import NOISE, distance, probe
from serve.engine.protocol import Accepted, Delta, Event
from serve.errors import BespokeError, EngineUnavailable, RegistryError
from serve.registry.validation import inspect
from serve.registry.versions import AdapterVersion
from tests.support.engine_host import RANK_MAX, TENANT, EngineHost, collect

pytestmark = pytest.mark.slow

OPENINGS = ("The", "Bicycle tea", "Hello there", "Once", "Rain on", "Why do", "Blue", "Seven", "It", "Please")
# With small weights the tiny model soon repeats itself, so that even a long answer is sure (see LEAD_MIN).
CALM, LONG_TOKENS = 0.03, 120


async def begun(events: AsyncIterator[list[Event]]) -> str:
    """Reads the first text of a stream, so that it is decoding."""
    async for batch in events:
        text = "".join(event.text for event in batch if isinstance(event, Delta))
        assert text or any(isinstance(event, Accepted) for event in batch)
        if text:
            return text
    raise AssertionError("the stream ended at once")


def long_reference(host: EngineHost, adapter: AdapterVersion | None) -> tuple[str, str]:
    (((prompt, _), text),) = host.references(adapter, [(text, LONG_TOKENS) for text in OPENINGS], 1).items()
    return prompt, text


def calm(host: EngineHost, name: str) -> tuple[AdapterVersion, str, str]:
    """Publishes an adapter with a long answer that is sure."""
    for seed in range(20):
        adapter = host.publish(name, seed, size=CALM)
        try:
            return adapter, *long_reference(host, adapter)
        except AssertionError:
            continue
    raise AssertionError("no adapter is calm enough")


def test_47724_adapters_added_while_others_decode_change_nobodys_tokens(host: EngineHost) -> None:
    first, first_prompt, first_text = calm(host, "long")
    base_prompt, base_text = long_reference(host, None)
    others = [host.publish("added", 900 + seed) for seed in range(3)]
    references = [host.references(other, [(text, 8) for text in OPENINGS], 2) for other in others]
    for other in others:
        host.run(host.engine.unload(other.id))

    async def streaming(adapter: AdapterVersion | None, prompt: str, through: asyncio.Event) -> list[str]:
        """One long answer after another, until the others are through."""
        texts = []
        while not through.is_set():
            texts.append((await host.answer(adapter, prompt, LONG_TOKENS)).text)
        return texts

    async def scenario() -> tuple[list[str], list[str], list[tuple[str, str]]]:
        through = asyncio.Event()
        long = [
            asyncio.create_task(streaming(adapter, prompt, through))
            for adapter, prompt in ((first, first_prompt), (None, base_prompt))
        ]
        pairs = []
        for other, expected in zip(others, references, strict=True):
            for (prompt, tokens), want in expected.items():
                pairs.append(((await host.answer(other, prompt, tokens)).text, want))
        through.set()
        return await long[0], await long[1], pairs

    of_first, of_base, pairs = host.run(scenario())
    assert set(of_first) == {first_text}
    assert set(of_base) == {base_text}
    assert [got for got, _ in pairs] == [want for _, want in pairs]


def test_42125_a_new_version_never_answers_from_the_old_ones_cache(host: EngineHost) -> None:
    shared = "A long preamble that fills blocks of the prefix cache, said again and again. " * 24
    candidates = [(shared + opening, 8) for opening in OPENINGS]
    old, new = (host.publish("moved", seed, tenant=TENANT) for seed in (41, 42))
    old_answers, new_answers = (host.references(version, candidates, 3) for version in (old, new))
    salt = "one tenant's salt"
    for (prompt, tokens), want in old_answers.items():
        host.ask(old, prompt, tokens, salt=salt)
        warm = host.ask(old, prompt, tokens, salt=salt)
        assert warm.finished.cached_tokens > 0
        assert warm.text == want

    for number, ((prompt, tokens), want) in enumerate(new_answers.items()):
        cold = host.ask(new, prompt, tokens, salt=salt)
        assert number or cold.finished.cached_tokens == 0, "another version's blocks were taken"
        warm = host.ask(new, prompt, tokens, salt=salt)
        assert warm.finished.cached_tokens > 0
        assert (cold.text, warm.text) == (want, want)
    assert not set(old_answers.values()) & set(new_answers.values())


def test_42125_streams_of_the_old_version_finish_on_it_after_the_alias_has_moved(host: EngineHost) -> None:
    old, old_prompt, old_text = calm(host, "in-flight")
    new = host.publish("in-flight", 4242)
    ((new_prompt, tokens), new_text), *_ = host.references(new, [(text, 8) for text in OPENINGS], 1).items()

    async def scenario() -> tuple[str, str]:
        stream = host.stream(old, old_prompt, LONG_TOKENS)[1]
        start = await begun(stream)
        rest = asyncio.create_task(collect(stream))
        await host.engine.apply_desired(frozenset({new.id}), [new])  # the registry has dropped the old one
        assert old.id in host.engine.loaded_adapters, "it was to be in flight still"
        answer = await host.answer(new, new_prompt, tokens)
        return start + (await rest).text, answer.text

    assert host.run(scenario()) == (old_text, new_text)


def misnamed(host: EngineHost, name: str, seed: int, old: str, new: str) -> AdapterVersion:
    """Publishes an adapter with a matching card, none of whose tensors has a name of the base's modules."""
    good = host.publish(name, seed).path(host.adapters_dir)
    with tempfile.TemporaryDirectory(dir=host.adapters_dir.parent) as staging:
        directory = Path(staging) / "adapter"
        shutil.copytree(good, directory)
        tensors = load_file(directory / WEIGHTS_NAME)
        renamed = {name.replace(old, new): tensors[name] for name in tensors}
        save_file(renamed, directory / WEIGHTS_NAME)
        (directory / CARD_NAME).unlink()
        version = content_version(directory)
        changes = {"version": version, "weights_sha256": file_sha256(directory / WEIGHTS_NAME)}
        write_card(directory, read_card(good).model_copy(update=changes))
        directory.rename(good.parent / version)
    return host.ref(name, version)


FOREIGN = [("model.layers", "wrong_model.layers"), ("base_model.model.", "base_model.wrong_model.")]


@pytest.mark.parametrize(("old", "new"), FOREIGN, ids=["of the base", "of the adapter"])
def test_34186_an_adapter_with_a_foreign_prefix_is_refused_by_its_tensors_name(
    host: EngineHost, old: str, new: str
) -> None:
    path = misnamed(host, "foreign", 1, old, new).path(host.adapters_dir)
    with pytest.raises(RegistryError, match=r"base_model\..*wrong_model\..*layers\.0"):
        inspect(path, host.base_dir, max_rank=RANK_MAX)


@pytest.mark.parametrize(("old", "new"), FOREIGN, ids=["of the base", "of the adapter"])
def test_34186_an_engine_that_is_given_one_nevertheless_refuses_it_and_lives_on(
    host: EngineHost, old: str, new: str
) -> None:
    adapter = misnamed(host, "foreign", 2, old, new)
    before = host.run(host.engine.logprobs(None))
    try:
        reason = host.run(probe(host.engine, adapter))
    except EngineUnavailable as error:
        reason = str(error)
    assert reason
    host.run(host.engine.check_health())
    assert distance(before, host.run(host.engine.logprobs(None))) < NOISE


def test_an_adapter_without_an_effect_is_rejected(host: EngineHost) -> None:
    reason = host.run(probe(host.engine, host.publish("nothing", 1, size=1e-9)))
    assert reason is not None
    assert "changes nothing" in reason


def test_a_good_adapter_passes_its_probe_and_leaves_the_base_as_it_was(host: EngineHost) -> None:
    before = host.run(host.engine.logprobs(None))
    adapter = host.publish("good", 1)
    assert host.run(probe(host.engine, adapter)) is None
    assert adapter.id not in host.engine.loaded_adapters
    assert host.run(host.engine.logprobs(None)) == pytest.approx(before, abs=NOISE / 10)


def test_bytes_that_changed_after_registration_are_refused_and_the_engine_lives_on(host: EngineHost) -> None:
    adapter, other = host.publish("changed", 1), host.publish("unchanged", 2)
    ((prompt, tokens), want), *_ = host.references(other, [(text, 8) for text in OPENINGS], 1).items()
    weights = adapter.path(host.adapters_dir) / WEIGHTS_NAME
    weights.chmod(0o644)
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(BespokeError) as refused:
        host.ask(adapter, "The")
    assert isinstance(refused.value, EngineUnavailable)
    reason = host.run(probe(host.engine, adapter))
    assert reason is not None
    assert "not those that were registered" in reason
    assert host.ask(other, prompt, tokens).text == want
    host.run(host.engine.check_health())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert host.ask(adapter, "The").finished.completion_tokens > 0, "what failed once is tried again"
