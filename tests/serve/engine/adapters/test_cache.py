"""Checks the tier between the disk and the slots: when and how often it loads, and what must stay."""

import asyncio
from collections import Counter
from math import sqrt
from pathlib import Path

import pytest

from finetune.card import (
    ADAPTER_CONFIG_NAME,
    CARD_NAME,
    WEIGHTS_NAME,
    CardMismatch,
    content_version,
    write_card,
)
from serve.engine.adapters.cache import AdapterCache, read_verified
from serve.registry.versions import AdapterVersion
from serve.vllm_plugin.packed import Layer, Layout, Packed
from tests.support.finetune_samples import card_for
from tests.support.lora_samples import RANK, publish_sample, write_adapter

TENANT, CAPACITY = "acme", 2


class Loader:
    """Stands in for vLLM's own loading, as AdapterCache calls it: slow or failing on demand."""

    def __init__(self) -> None:
        self.started: Counter[int] = Counter()
        self.failing: set[int] = set()
        self.free = asyncio.Event()
        self.free.set()

    async def __call__(self, ref: AdapterVersion, path: Path) -> None:
        self.started[ref.id] += 1
        await self.free.wait()
        if ref.id in self.failing:
            raise OSError("made to fail")


@pytest.fixture
def refs(tmp_path: Path) -> list[AdapterVersion]:
    return [
        AdapterVersion(
            number, TENANT, "support", publish_sample(tmp_path, TENANT, "support", alpha=number).name
        )
        for number in range(1, 6)
    ]


def adapter_cache(tmp_path: Path, loader: Loader, layout: Layout | None = None) -> AdapterCache:
    directory = tmp_path / "packed"
    directory.mkdir(exist_ok=True)
    return AdapterCache(layout, tmp_path / "adapters", directory, capacity=CAPACITY, preload=loader)


async def use(adapter_cache: AdapterCache, ref: AdapterVersion) -> Path:
    async with adapter_cache.hold(ref) as path:
        return path


async def until_started(loader: Loader, count: int) -> None:
    async with asyncio.timeout(10):
        while len(loader.started) < count:
            await asyncio.sleep(0.001)


def test_an_adapter_is_loaded_once_however_many_ask_for_it_at_a_time(
    refs: list[AdapterVersion], tmp_path: Path
) -> None:
    async def scenario() -> None:
        loader = Loader()
        held = adapter_cache(tmp_path, loader)
        paths = await asyncio.gather(*(use(held, refs[0]) for _ in range(10)))
        assert set(paths) == {refs[0].path(tmp_path / "adapters")}
        await use(held, refs[0])
        assert (loader.started, held.loads, held.cached_ids) == ({1: 1}, 1, [1])

    asyncio.run(scenario())


def test_different_adapters_are_loaded_at_the_same_time(refs: list[AdapterVersion], tmp_path: Path) -> None:
    async def scenario() -> None:
        loader = Loader()
        loader.free.clear()
        held = adapter_cache(tmp_path, loader)
        tasks = [asyncio.create_task(use(held, ref)) for ref in refs[:3]]
        await until_started(loader, 3)  # though none has ended
        assert held.cached_ids == []
        loader.free.set()
        await asyncio.gather(*tasks)
        assert held.loads == 3

    asyncio.run(scenario())


def test_the_longest_unused_goes_first_and_no_more_than_the_capacity_stay(
    refs: list[AdapterVersion], tmp_path: Path
) -> None:
    async def scenario() -> None:
        held = adapter_cache(tmp_path, Loader())
        first, second, third, fourth, _ = refs
        for ref in (first, second, first, third):
            await use(held, ref)
        assert held.cached_ids == [1, 3]
        await use(held, fourth)
        assert (held.cached_ids, held.evictions) == ([3, 4], 2)

    asyncio.run(scenario())


def test_what_is_in_use_stays_and_goes_as_soon_as_it_is_not(
    refs: list[AdapterVersion], tmp_path: Path
) -> None:
    async def scenario() -> None:
        held = adapter_cache(tmp_path, Loader())
        async with held.hold(refs[0]), held.hold(refs[1]), held.hold(refs[2]):
            await use(held, refs[3])
            assert held.cached_ids == [1, 2, 3]
            assert not held.drop(1)
            assert held.cached_ids == [1, 2, 3]
        assert len(held.cached_ids) == CAPACITY
        for number in held.cached_ids:
            assert held.drop(number)
        assert held.drop(99), "what is not there is gone"
        assert held.cached_ids == []

    asyncio.run(scenario())


def test_what_is_pinned_stays_until_it_is_no_longer(refs: list[AdapterVersion], tmp_path: Path) -> None:
    async def scenario() -> None:
        held = adapter_cache(tmp_path, Loader())
        held.pinned = frozenset({1})
        for ref in refs:
            await use(held, ref)
        assert held.cached_ids == [1, 5]
        held.pinned = frozenset()
        await use(held, refs[1])
        assert held.cached_ids == [2, 5]

    asyncio.run(scenario())


def test_a_load_that_failed_is_tried_again_next_time(refs: list[AdapterVersion], tmp_path: Path) -> None:
    async def scenario() -> None:
        loader = Loader()
        loader.failing.add(1)
        held = adapter_cache(tmp_path, loader)
        outcomes = await asyncio.gather(*(use(held, refs[0]) for _ in range(3)), return_exceptions=True)
        assert [str(outcome) for outcome in outcomes] == ["made to fail"] * 3
        assert loader.started == {1: 1}
        loader.failing.clear()
        await use(held, refs[0])
        assert (loader.started, held.loads) == ({1: 2}, 1)

    asyncio.run(scenario())


def test_a_load_that_failed_is_not_held(refs: list[AdapterVersion], tmp_path: Path) -> None:
    async def scenario() -> None:
        loader = Loader()
        loader.failing.add(1)
        held = adapter_cache(tmp_path, loader)
        with pytest.raises(OSError, match="made to fail"):
            await use(held, refs[0])
        assert held.cached_ids == []

    asyncio.run(scenario())


def test_one_who_goes_away_does_not_undo_the_load_of_another(
    refs: list[AdapterVersion], tmp_path: Path
) -> None:
    async def scenario() -> None:
        loader = Loader()
        loader.free.clear()
        held = adapter_cache(tmp_path, loader)
        leaver, stayer = (asyncio.create_task(use(held, refs[0])) for _ in range(2))
        await until_started(loader, 1)
        leaver.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaver
        loader.free.set()
        assert await stayer == refs[0].path(tmp_path / "adapters")
        assert loader.started == {1: 1}
        assert held.drop(1), "the cancelled request holds it no longer"

    asyncio.run(scenario())


@pytest.mark.parametrize("name", [WEIGHTS_NAME, ADAPTER_CONFIG_NAME])
def test_bytes_that_are_not_those_of_the_card_are_refused(
    name: str, refs: list[AdapterVersion], tmp_path: Path
) -> None:
    directory = refs[0].path(tmp_path / "adapters")
    content = bytearray((directory / name).read_bytes())
    content[-1] ^= 1
    (directory / name).write_bytes(content)
    with pytest.raises(CardMismatch):
        read_verified(directory)
    for layout in (None, Layout((), "float32")):
        with pytest.raises(CardMismatch):
            asyncio.run(use(adapter_cache(tmp_path, Loader(), layout), refs[0]))


# Packing, with a layout


def layout_of(tensors: dict[str, object]) -> Layout:
    """Returns the layers that the sample adapter adapts, one by one, as a worker would name them."""
    shapes = {name.removeprefix("base_model.model."): tuple(t.shape) for name, t in tensors.items()}  # type: ignore[attr-defined]
    parts = sorted({name.rpartition(".lora_")[0] for name in shapes})
    layers = (
        Layer((part,), shapes[f"{part}.lora_A.weight"][1], (shapes[f"{part}.lora_B.weight"][0],))
        for part in parts
    )
    return Layout(tuple(layers), "float32")


def test_a_packed_adapter_is_on_disk_while_it_is_held_and_gone_when_it_is_not(
    refs: list[AdapterVersion], tmp_path: Path
) -> None:
    torch = pytest.importorskip("torch")
    tensors, config = read_verified(refs[3].path(tmp_path / "adapters"))
    layout = layout_of(tensors)

    async def scenario() -> None:
        loader = Loader()
        held = adapter_cache(tmp_path, loader, layout)
        async with held.hold(refs[3]) as path:
            opened = Packed.open(path, layout)
            for number, layer in enumerate(layout.layers):
                b = tensors[f"base_model.model.{layer.parts[0]}.lora_B.weight"]
                torch.testing.assert_close(
                    opened.weights[number][1], b.float().T * config["lora_alpha"] / RANK
                )
            await asyncio.gather(*(use(held, ref) for ref in refs[:2]))
            assert path.exists()
        for ref in refs[:2]:
            await use(held, ref)
        assert not path.exists()
        assert not loader.started, "what is packed is not loaded by vLLM"
        held.close()
        assert not (tmp_path / "packed").exists()

    asyncio.run(scenario())


def test_rank_stabilized_adapters_are_scaled_by_the_root_of_their_rank(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    staged = write_adapter(tmp_path / "staged", lora_alpha=8, use_rslora=True)
    (staged / CARD_NAME).unlink()
    write_card(staged, card_for(staged, tenant=TENANT, adapter="rooted", rank=RANK))
    ref = AdapterVersion(1, TENANT, "rooted", content_version(staged))
    path = ref.path(tmp_path / "adapters")
    path.parent.mkdir(parents=True)
    staged.rename(path)
    tensors, _ = read_verified(path)
    layout = layout_of(tensors)
    opened = Packed.open(asyncio.run(use(adapter_cache(tmp_path, Loader(), layout), ref)), layout)
    b = tensors[f"base_model.model.{layout.layers[0].parts[0]}.lora_B.weight"]
    torch.testing.assert_close(opened.weights[0][1], b.float().T * 8 / sqrt(RANK))


def test_what_cannot_be_packed_is_left_to_vllm_as_it_is(refs: list[AdapterVersion], tmp_path: Path) -> None:
    async def scenario() -> None:
        loader = Loader()
        held = adapter_cache(tmp_path, loader, Layout((), "float32"))
        assert await use(held, refs[0]) == refs[0].path(tmp_path / "adapters")
        assert loader.started == {1: 1}
        assert not list((tmp_path / "packed").glob("1"))

    asyncio.run(scenario())
