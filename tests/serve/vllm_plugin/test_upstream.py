"""Checks what the replacements in this package rely on in vLLM: signatures and attributes.

Whether a repair is still needed is checked in `test_cpu_lora.py` and `test_w8a8.py`.
"""

import functools
import inspect
from typing import Any

import pytest

pytest.importorskip("vllm")


def source(thing: Any) -> str:
    return inspect.getsource(thing)


def names(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_the_cpu_wrapper_still_has_the_operators_that_are_replaced() -> None:
    from vllm.lora.punica_wrapper import punica_base, punica_cpu

    from serve.vllm_plugin.cpu_lora import _add_lora_linear

    base, wrapper = punica_base.PunicaWrapperBase, punica_cpu.PunicaWrapperCPU
    assert issubclass(wrapper, base)
    linear = names(base.add_lora_linear)
    assert linear[:7] == names(_add_lora_linear)[:7]
    assert names(base.update_metadata)[1] == "mapping"
    assert isinstance(inspect.getattr_static(base, "token_lora_indices"), property)
    assert names(wrapper._expand_prefill) == names(wrapper._expand_decode)
    for name in ("bgmv_shrink", "bgmv_expand"):
        assert callable(getattr(punica_cpu, name))


def test_the_managers_still_have_the_methods_that_are_wrapped() -> None:
    from vllm.lora import model_manager, worker_manager

    from serve.vllm_plugin import upstream

    manager = model_manager.LoRAModelManager
    assert [names(getattr(manager, name)) for name in ("register_module", "activate_adapter")] == [
        ["self", "module_name", "module"],
        ["self", "lora_id"],
    ]
    assert names(manager._add_adapter) == ["self", "lora"]
    assert names(manager._deactivate_adapter) == ["self", "lora_id"]
    assert names(manager.remove_all_adapters) == ["self"]
    assert names(worker_manager.WorkerLoRAManager._load_adapter) == ["self", "lora_request"]
    assert upstream.loaded_model(3, 8).rank == 8


def test_the_managers_still_have_the_attributes_that_the_replacements_read() -> None:
    from vllm.lora import model_manager, worker_manager

    manager = source(model_manager)
    for attribute in (
        *("self._active_adapters", "self._registered_adapters", "self.lora_index_to_id", "self.modules"),
        *(
            "self.packed_modules",
            "self.punica_wrapper_mapping",
            "def _get_punica_wrapper",
            "def list_adapters",
        ),
    ):
        assert attribute in manager, attribute
    assert "self._adapter_manager" in source(worker_manager)


def test_a_worker_still_has_its_manager_where_it_was() -> None:
    from vllm.v1.worker import lora_model_runner_mixin

    assert "self.lora_manager = " in source(lora_model_runner_mixin)


def test_a_model_still_says_how_it_renames_a_checkpoints_modules() -> None:
    from vllm.model_executor.models.utils import WeightsMapper

    from serve.vllm_plugin import upstream

    class Model:
        hf_to_vllm_mapper = WeightsMapper(orig_to_new_prefix={"model.language.": "language."})

    assert upstream.module_renaming(Model())("model.language.layers.0") == "language.layers.0"
    assert upstream.module_renaming(object())("model.layers.0") == "model.layers.0"


def test_the_lookup_of_a_layers_device_is_still_imported_by_name() -> None:
    from vllm.lora.layers import base_linear, utils

    assert names(utils._get_lora_device) == ["base_layer"]
    assert "_get_lora_device" in vars(base_linear)


def test_vllm_still_finds_this_package_by_its_entry_point() -> None:
    from importlib.metadata import entry_points

    from vllm import plugins

    assert plugins.DEFAULT_PLUGINS_GROUP == "vllm.general_plugins"
    values = [entry.value for entry in entry_points(group=plugins.DEFAULT_PLUGINS_GROUP)]
    assert "serve.vllm_plugin:register" in values


def test_the_core_still_compiles_grammars_with_an_executor_that_can_be_replaced() -> None:
    from vllm.v1.structured_output import StructuredOutputManager, backend_xgrammar, request

    manager = source(StructuredOutputManager)
    assert "self.executor.submit(self._create_grammar, request)" in manager
    assert "self.executor.shutdown(wait=True, cancel_futures=True)" in manager
    assert "struct_request.structured_output_key" in manager
    assert isinstance(
        vars(request.StructuredOutputRequest)["structured_output_key"], functools.cached_property
    )
    assert "ctx" in vars(backend_xgrammar.XgrammarGrammar)["__dataclass_fields__"]
    assert (
        "self.compiler = xgr.GrammarCompiler(\n            tokenizer_info,\n            max_threads=8"
        in source(backend_xgrammar)
    )
    assert "cache_limit_bytes=vllm.envs.VLLM_XGRAMMAR_CACHE_MB * 1024 * 1024" in source(backend_xgrammar)
