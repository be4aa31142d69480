"""Puts the replacements of this package into vLLM's modules; docs/upstream.md lists them all.

This is the one module that assigns to names of vLLM's. What is put there stands beside: `cpu_lora`,
`cpu_slots`, `w8a8`. Paths are those of vLLM 0.32. The tests in `tests/serve/vllm_plugin/test_upstream.py`
fail once vLLM changes a signature that a replacement relies on.
"""

from collections.abc import Callable, Mapping
from typing import Any

Wrap = Callable[[Any], Any]  # an original function → the one to take its place


def adapterless_rows_get_a_delta() -> bool:
    """Finds out whether vLLM still gives tokens without an adapter the last slot's delta (issue 48421).

    Index −1 stands for "no adapter" in `lora/ops/torch_ops/lora_ops.py`, and Python reads it as the last.
    """
    import torch
    from vllm.lora.ops.torch_ops import bgmv_expand, bgmv_shrink

    hidden, output, no_adapter = torch.zeros(1, 1), torch.zeros(1, 1), torch.tensor([-1])
    bgmv_shrink(torch.ones(1, 1), torch.ones(1, 1, 1, 1), hidden, no_adapter, 1.0)
    bgmv_expand(hidden, torch.ones(1, 1, 1, 1), output, no_adapter)
    return bool(output.any())


def replace_cpu_lora(update_metadata: Any, add_lora_linear: Any, mask: Wrap) -> bool:
    """Replaces PunicaWrapperCPU's linear path (`lora/punica_wrapper/punica_cpu.py`) and masks the rest of it.

    False if that was done before, or if vLLM no longer needs it.
    """
    from vllm.lora.punica_wrapper import punica_cpu

    wrapper = punica_cpu.PunicaWrapperCPU
    if getattr(wrapper, "bespoke_repaired", False) or not adapterless_rows_get_a_delta():
        return False
    wrapper.bespoke_repaired = True
    wrapper.update_metadata = update_metadata
    wrapper.add_lora_linear = add_lora_linear
    for name in ("bgmv_shrink", "bgmv_expand"):  # logits and embeddings still use these
        setattr(punica_cpu, name, mask(getattr(punica_cpu, name)))
    wrapper._expand_prefill = wrapper._expand_decode  # the prefill form hides the indices; same result
    return True


def base_update_metadata(wrapper: Any, *args: Any, **kwargs: Any) -> None:
    """Calls what PunicaWrapperCPU inherits: it fills `token_lora_indices` (`punica_base.py`)."""
    from vllm.lora.punica_wrapper.punica_base import PunicaWrapperBase

    PunicaWrapperBase.update_metadata(wrapper, *args, **kwargs)


def replace_slot_handling(manager: Mapping[str, Wrap], load_adapter: Wrap) -> None:
    """Wraps methods of LoRAModelManager, and WorkerLoRAManager's loading of an adapter's files.

    vLLM reads an adapter's files within the engine's step and leaves a freed slot as it was
    (`lora/model_manager.py`, `lora/worker_manager.py`). Does nothing the second time.
    """
    from vllm.lora import model_manager, worker_manager

    managers, workers = model_manager.LoRAModelManager, worker_manager.WorkerLoRAManager
    if getattr(managers, "bespoke_slots", False):
        return
    managers.bespoke_slots = True
    for name, wrap in manager.items():
        setattr(managers, name, wrap(getattr(managers, name)))
    workers._load_adapter = load_adapter(workers._load_adapter)


def loaded_model(adapter: int, rank: int) -> Any:
    """Makes vLLM's LoRAModel without weights, for an adapter whose weights are packed."""
    from vllm.lora.lora_model import LoRAModel

    return LoRAModel(adapter, rank, {})


def adapter_manager(worker: Any) -> Any:
    """Returns the LoRAModelManager of a worker, which has no public way to it."""
    return worker.model_runner.lora_manager._adapter_manager


def module_renaming(model: Any) -> Callable[[str], str]:
    """Returns how `model` renames a checkpoint's modules to its own; `hf_to_vllm_mapper` says so."""
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    if mapper is None:
        return str
    rename: Callable[[str], str] = mapper.get_rename_mapper()._map_name
    return rename


def device_lookup_fails(layer: Any) -> bool:
    """Finds out whether vLLM fails to name the device of `layer`, whose weight oneDNN has packed away."""
    from vllm.lora.layers import utils

    try:
        utils._get_lora_device(layer)
    except AttributeError:
        return True
    return False


def replace_device_lookup(wrap: Wrap) -> None:
    """Wraps `_get_lora_device` of `lora/layers/utils.py`, which reads `weight.device` of every base layer."""
    from vllm.lora.layers import base_linear, utils

    # base_linear has imported the name; other layer kinds (embeddings, experts) are not packed so.
    utils._get_lora_device = base_linear._get_lora_device = wrap(utils._get_lora_device)


def int8_kernel_choice() -> Any:
    """Returns vLLM's `check_cpu_sgl_kernel` as its INT8 layers call it."""
    from vllm.model_executor.kernels.linear.scaled_mm import cpu

    return cpu.check_cpu_sgl_kernel


def replace_int8_kernel_choice(wrap: Wrap) -> None:
    """Wraps `check_cpu_sgl_kernel`, by which an INT8 layer takes the AMX kernel instead of oneDNN's."""
    from vllm.model_executor.kernels.linear.scaled_mm import cpu

    cpu.check_cpu_sgl_kernel = wrap(cpu.check_cpu_sgl_kernel)


def replace_grammar_threads(threads: Callable[[Any, int], Any]) -> None:
    """Puts `threads` in the place of the executor that compiles grammars in vLLM's core.

    `v1/structured_output/__init__.py`: StructuredOutputManager makes it, and calls its `submit` and
    `shutdown`. xgrammar would use 8 threads for each grammar (`backend_xgrammar.py`), as many as the model's
    step and more; it gets that one. Does nothing the second time.
    """
    import xgrammar
    from vllm import envs
    from vllm.v1.structured_output import StructuredOutputManager

    if getattr(StructuredOutputManager, "bespoke_threads", False):
        return
    StructuredOutputManager.bespoke_threads = True
    library: Any = xgrammar
    original, compiler = StructuredOutputManager.__init__, library.GrammarCompiler

    def compiler_of_one_thread(tokenizer: Any, **kwargs: Any) -> Any:
        return compiler(tokenizer, **(kwargs | {"max_threads": 1}))

    library.GrammarCompiler = compiler_of_one_thread

    def init(manager: Any, *args: Any, **kwargs: Any) -> None:
        original(manager, *args, **kwargs)
        if hasattr(manager, "executor"):  # not without a tokenizer
            manager.executor = threads(manager.executor, envs.VLLM_XGRAMMAR_CACHE_MB * 1024 * 1024)

    StructuredOutputManager.__init__ = init


def compiled_bytes(grammar: Any) -> int:
    """Returns the memory of vLLM's XgrammarGrammar (`v1/structured_output/backend_xgrammar.py`)."""
    return int(grammar.ctx.memory_size_bytes)
