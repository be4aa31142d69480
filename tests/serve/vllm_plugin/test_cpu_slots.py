"""Checks that a slot holds one adapter as it was packed, and nothing after it has left."""

from pathlib import Path
from typing import Any

import pytest

from serve.vllm_plugin.packed import Packed

torch = pytest.importorskip("torch")

SLOTS, RANK, WIDTH_IN, WIDTHS = 2, 4, 6, (8, 4)


class Module:
    """Stands in for an adaptable layer, as far as the replacements read it."""

    def __init__(self) -> None:
        from serve.vllm_plugin.cpu_lora import stack

        a = tuple(torch.zeros(SLOTS, 1, RANK, WIDTH_IN) for _ in WIDTHS)
        b = tuple(torch.zeros(SLOTS, 1, width, RANK) for width in WIDTHS)
        self.lora_a_stacked, self.lora_b_stacked = stack(a, b)

    def holds(self, slot: int) -> bool:
        return bool(self.lora_a_stacked.whole[slot].any() or self.lora_b_stacked.whole[slot].any())


class Lora:
    def __init__(self, number: int, packed: Packed | None) -> None:
        self.id, self.rank = number, RANK - 1
        if packed is not None:
            self.bespoke_packed = packed


class Manager:
    """vLLM's LoRAModelManager in small: its bookkeeping of slots, which the patches wrap."""

    def __init__(self) -> None:
        self.modules = {"joined": Module(), "other": Module(), "not adaptable": object()}
        self.lora_index_to_id: list[int | None] = [None] * SLOTS
        self._active_adapters: dict[int, None] = {}
        self._registered_adapters: dict[int, Lora] = {}
        self.punica_wrapper_mapping: dict[str, Any] = {"default": type("Wrapper", (), {})()}

    def list_adapters(self) -> dict[int, Lora]:
        return dict(self._registered_adapters)

    def activate_adapter(self, lora_id: int) -> bool:
        """Writes, as vLLM does, the weights through the views of the slices."""
        slot = self.lora_index_to_id.index(None)
        self._active_adapters[lora_id] = None
        self.lora_index_to_id[slot] = lora_id
        module: Any = self.modules["joined"]
        for part in (*module.lora_a_stacked, *module.lora_b_stacked):
            part[slot] = 1.0
        return True

    def _deactivate_adapter(self, lora_id: int) -> None:
        self.lora_index_to_id[self.lora_index_to_id.index(lora_id)] = None

    def deactivate(self, lora_id: int) -> None:
        self._deactivate_adapter(lora_id)
        del self._active_adapters[lora_id]

    def _add_adapter(self, lora: Lora) -> None:
        self._registered_adapters[lora.id] = lora

    def remove_all_adapters(self) -> None:
        self._registered_adapters.clear()
        self._active_adapters.clear()
        self.lora_index_to_id = [None] * SLOTS

    def holding(self) -> list[bool]:
        modules = [module for module in self.modules.values() if isinstance(module, Module)]
        return [any(module.holds(slot) for module in modules) for slot in range(SLOTS)]


@pytest.fixture
def manager(monkeypatch: pytest.MonkeyPatch) -> Manager:
    from serve.vllm_plugin import cpu_slots

    for name in ("activate_adapter", "_deactivate_adapter", "_add_adapter", "remove_all_adapters"):
        wrap = getattr(cpu_slots, name if name.startswith("_") else f"_{name}")
        monkeypatch.setattr(Manager, name, wrap(getattr(Manager, name)))
    return Manager()


def add(manager: Manager, number: int, *, layers: tuple[int, ...] = (0, 1), packed: bool = True) -> Packed:
    rank = RANK - 1
    packed_adapter = Packed(
        rank,
        {
            layer: (torch.randn(rank, len(WIDTHS), WIDTH_IN), torch.randn(rank, sum(WIDTHS)))
            for layer in layers
        },
    )
    manager._add_adapter(Lora(number, packed_adapter if packed else None))
    return packed_adapter


def test_a_slot_holds_what_was_packed_and_is_zero_beyond_the_adapters_rank(manager: Manager) -> None:
    torch.manual_seed(0)
    packed = add(manager, 7)
    assert manager.activate_adapter(7)
    assert not manager.activate_adapter(7), "it is there already"
    for number, module in enumerate((manager.modules["joined"], manager.modules["other"])):
        assert isinstance(module, Module)
        a, b = packed.weights[number]
        torch.testing.assert_close(module.lora_a_stacked.whole[0, : packed.rank], a)
        torch.testing.assert_close(module.lora_b_stacked.whole[0, : packed.rank], b)
        assert not module.lora_a_stacked.whole[0, packed.rank :].any()
        assert not module.lora_b_stacked.whole[0, packed.rank :].any()
        assert module.lora_a_stacked.used == {0}


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "loaded by vLLM"])
def test_a_freed_slot_holds_nothing_and_its_neighbour_all(manager: Manager, packed: bool) -> None:
    torch.manual_seed(0)
    for number in (7, 8):
        add(manager, number, packed=packed)
        manager.activate_adapter(number)
    assert manager.holding() == [True, True]
    manager.deactivate(7)
    assert manager.holding() == [False, True]
    assert all(m.lora_a_stacked.used <= {1} for m in manager.modules.values() if isinstance(m, Module))


def test_an_adapter_of_fewer_layers_finds_none_of_the_one_before_it_in_its_slot(manager: Manager) -> None:
    torch.manual_seed(0)
    add(manager, 7)
    manager.activate_adapter(7)
    manager.deactivate(7)
    add(manager, 8, layers=(1,))
    manager.activate_adapter(8)
    joined, other = manager.modules["joined"], manager.modules["other"]
    assert isinstance(joined, Module)
    assert isinstance(other, Module)
    assert (joined.holds(0), other.holds(0)) == (False, True)
    assert joined.lora_a_stacked.used == set()


def test_removing_all_adapters_leaves_nothing_in_any_slot(manager: Manager) -> None:
    for number in (7, 8):
        add(manager, number)
        manager.activate_adapter(number)
    manager.remove_all_adapters()
    assert manager.holding() == [False, False]


def test_more_adapters_than_slots_are_an_error_and_the_slots_stay_as_they_are(manager: Manager) -> None:
    for number in (7, 8, 9):
        add(manager, number)
    for number in (7, 8):
        manager.activate_adapter(number)
    with pytest.raises(ValueError, match="No free lora slots"):
        manager.activate_adapter(9)
    assert manager.lora_index_to_id == [7, 8]


def test_residency_says_what_is_where_and_what_moved(manager: Manager) -> None:
    from serve.vllm_plugin import cpu_slots

    for number in (7, 8):
        add(manager, number)
        manager.activate_adapter(number)
    manager.deactivate(7)
    residency = cpu_slots.residency(manager)
    assert residency.pop("seconds") > 0
    assert residency == {"slots": [8], "memory": [7, 8], "activations": 2, "evictions": 1}


def test_a_folder_that_was_not_packed_is_loaded_by_vllm(tmp_path: Path) -> None:
    from serve.vllm_plugin import cpu_slots

    class Workers:
        _adapter_manager = Manager()

    Workers._adapter_manager.bespoke_layout = None  # type: ignore[attr-defined]
    request = type("Request", (), {"lora_path": str(tmp_path)})()
    load = cpu_slots._load_adapter(lambda self, request: "vLLM's own")
    assert load(Workers(), request) == "vLLM's own"
