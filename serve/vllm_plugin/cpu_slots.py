"""Loads adapters into the slots of vLLM's CPU LoRA, and empties slots when adapters leave them.

It wraps methods of `vllm.lora.model_manager` and `worker_manager`, and is installed with `cpu_lora`. An
adapter whose path is that of a packed one (`packed.py`) is mapped and copied. Any other is loaded by vLLM
itself.
"""

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from serve.vllm_plugin import upstream
from serve.vllm_plugin.cpu_lora import Stack, stack, state
from serve.vllm_plugin.packed import INDEX_NAME, Layer, Layout, Packed


@dataclass
class Traffic:
    """Counts loads and evictions of one worker's slots since it started."""

    activations: int = 0
    evictions: int = 0
    seconds: float = 0.0


def install() -> None:
    """Wraps the managers' methods, once."""
    upstream.replace_slot_handling(
        {
            "register_module": _register_module,
            "activate_adapter": _activate_adapter,
            "_deactivate_adapter": _deactivate_adapter,
            "_add_adapter": _add_adapter,
            "remove_all_adapters": _remove_all_adapters,
        },
        _load_adapter,
    )


def layout(manager: Any) -> Layout | None:
    """Returns the layers of a LoRAModelManager in its order, or None where packing may be wrong."""
    if not hasattr(manager, "bespoke_layout"):
        manager.bespoke_layout = _layout(manager)
    worker_layout: Layout | None = manager.bespoke_layout
    return worker_layout


def _layout(manager: Any) -> Layout | None:
    rename = upstream.module_renaming(manager.model)
    layers, dtypes = [], set()
    for name, module in manager.modules.items():
        a, b = getattr(module, "lora_a_stacked", None), getattr(module, "lora_b_stacked", None)
        if not isinstance(a, Stack) or not isinstance(b, Stack) or module.tp_size > 1:
            return None
        parts = tuple(manager.packed_modules.get(name, [name]))
        # A checkpoint's name that is not the module's own is left to vLLM to translate.
        if len(parts) != len(a) or any(rename(part) != part for part in parts):
            return None
        layers.append(Layer(parts, a.whole.shape[3], tuple(part.shape[2] for part in b)))
        dtypes.add(str(a.whole.dtype).removeprefix("torch."))
    return Layout(tuple(layers), dtypes.pop()) if len(dtypes) == 1 else None


def traffic(manager: Any) -> Traffic:
    totals: Traffic = manager.__dict__.setdefault("bespoke_traffic", Traffic())
    return totals


def residency(manager: Any) -> dict[str, Any]:
    """Returns ids in slots and in the worker's memory, and the traffic so far, as plain values to be sent."""
    return {
        "slots": [lora_id for lora_id in manager.lora_index_to_id if lora_id is not None],
        "memory": sorted(manager.list_adapters()),
        **asdict(traffic(manager)),
    }


def _register_module(original: Any) -> Any:
    def register_module(self: Any, module_name: str, module: Any) -> None:
        weights = getattr(module, "lora_a_stacked", None)
        if isinstance(weights, tuple) and len({a.shape for a in weights}) == 1:
            module.lora_a_stacked, module.lora_b_stacked = stack(weights, module.lora_b_stacked)
            state(self._get_punica_wrapper(module_name)).dtype = weights[0].dtype
        original(self, module_name, module)

    return register_module


def _load_adapter(original: Any) -> Any:
    def _load_adapter(self: Any, lora_request: Any) -> Any:
        path, worker_layout = Path(lora_request.lora_path), layout(self._adapter_manager)
        if worker_layout is None or not (path / INDEX_NAME).exists():
            return original(self, lora_request)
        packed = Packed.open(path, worker_layout)
        model = upstream.loaded_model(lora_request.lora_int_id, packed.rank)
        model.bespoke_packed = packed
        return model

    return _load_adapter


def _add_adapter(original: Any) -> Any:
    def _add_adapter(self: Any, lora: Any) -> None:
        if hasattr(lora, "bespoke_packed"):
            self._registered_adapters[lora.id] = lora  # it is joined and scaled already
        else:
            original(self, lora)

    return _add_adapter


def _activate_adapter(original: Any) -> Any:
    def activate_adapter(self: Any, lora_id: int) -> bool:
        if lora_id in self._active_adapters:
            return False
        started_s = time.perf_counter()
        lora = self._registered_adapters[lora_id]
        packed = getattr(lora, "bespoke_packed", None)
        if packed is None:
            original(self, lora_id)
            slot = self.lora_index_to_id.index(lora_id)
            for module in _stacked(self):
                module.lora_a_stacked.used.add(slot)
        else:
            if None not in self.lora_index_to_id:
                raise ValueError("No free lora slots")
            slot = self.lora_index_to_id.index(None)
            self._active_adapters[lora_id] = None
            self.lora_index_to_id[slot] = lora_id
            _fill(list(self.modules.values()), slot, packed)
        for wrapper in self.punica_wrapper_mapping.values():
            state(wrapper).ranks[slot] = lora.rank
        totals = traffic(self)
        totals.activations += 1
        totals.seconds += time.perf_counter() - started_s
        return True

    return activate_adapter


def _fill(modules: list[Any], slot: int, packed: Packed) -> None:
    # The slot is zero, see `_deactivate_adapter`. Layers that the adapter lacks need not be written.
    for number, (a, b) in packed.weights.items():
        module = modules[number]
        module.lora_a_stacked.whole[slot, : packed.rank] = a
        module.lora_b_stacked.whole[slot, : packed.rank] = b
        module.lora_a_stacked.used.add(slot)


def _deactivate_adapter(original: Any) -> Any:
    """Empties a freed slot, so that no later mistake can serve its adapter."""

    def _deactivate_adapter(self: Any, lora_id: int) -> None:
        if lora_id in self.lora_index_to_id:
            _empty(self, self.lora_index_to_id.index(lora_id))
            traffic(self).evictions += 1
        original(self, lora_id)

    return _deactivate_adapter


def _remove_all_adapters(original: Any) -> Any:
    def remove_all_adapters(self: Any) -> None:
        for slot in range(len(self.lora_index_to_id)):
            _empty(self, slot)
        original(self)

    return remove_all_adapters


def _empty(manager: Any, slot: int) -> None:
    for module in _stacked(manager):
        a, b = module.lora_a_stacked, module.lora_b_stacked
        if slot in a.used:
            a.whole[slot].zero_()
            b.whole[slot].zero_()
            a.used.discard(slot)


def _stacked(manager: Any) -> list[Any]:
    return [
        module
        for module in manager.modules.values()
        if isinstance(getattr(module, "lora_a_stacked", None), Stack)
    ]
