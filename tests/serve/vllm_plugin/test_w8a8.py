"""Checks INT8 bases (W8A8, compressed-tensors) with LoRA on."""

import importlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from serve.engine.adapters.probe import probe
from serve.engine.vllm.engine import VllmEngine
from serve.registry.validation import decoder_linears
from tests.support.constants import TINY
from tests.support.engine_host import SETTINGS, EngineHost, EventLoopThread

torch = pytest.importorskip("torch")

_WEIGHTS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
_ACTIVATIONS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
W8A8 = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {"targets": ["Linear"], "weights": _WEIGHTS, "input_activations": _ACTIVATIONS}
    },
}


def quantize(base_dir: Path, directory: Path) -> Path:
    """Rounds every decoder layer's weights to INT8, one scale per output channel: weight ≈ scale · INT8."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(base_dir, directory)
    tensors = load_file(directory / "model.safetensors")
    for module in decoder_linears(base_dir):
        weight = tensors[f"{module}.weight"].float()
        scale = weight.abs().amax(dim=1, keepdim=True) / 127
        tensors[f"{module}.weight"] = (weight / scale).round().to(torch.int8)
        tensors[f"{module}.weight_scale"] = scale
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": W8A8}))
    return directory


@pytest.mark.slow
def test_an_int8_base_answers_with_and_without_an_adapter(
    base_dir: Path, loop: EventLoopThread, tmp_path: Path
) -> None:
    quantized = quantize(base_dir, tmp_path / "bases" / TINY)
    adapters_dir = tmp_path / "adapters"
    engine = loop.run(VllmEngine.start(TINY, quantized, adapters_dir, SETTINGS, "int8"), 300)
    try:
        host = EngineHost(engine, loop, quantized, adapters_dir)
        adapter = host.publish("int8", 1)
        assert loop.run(probe(engine, adapter)) is None
        plain, adapted = host.ask(None, "Hello there"), host.ask(adapter, "Hello there")
        assert plain.finished.completion_tokens == adapted.finished.completion_tokens == 8
        assert plain.text != adapted.text
        assert host.ask(None, "Hello there").text == plain.text
        assert engine.loaded_adapters == [adapter.id]
    finally:
        engine.shutdown()


@pytest.fixture
def unpatched() -> Iterator[Any]:
    """Gives vLLM's own functions, and repairs them again afterwards."""
    from vllm.lora.layers import base_linear, utils

    from serve.vllm_plugin import register

    importlib.reload(utils)
    base_linear._get_lora_device = utils._get_lora_device
    yield utils
    register()


class Packed(torch.nn.Module):  # type: ignore[misc]
    """Stands in for a layer whose weight oneDNN has packed away."""

    weight = None

    def __init__(self) -> None:
        super().__init__()
        self.weight_scale = torch.nn.Parameter(torch.ones(2))


def test_vllm_still_needs_the_repair(unpatched: Any) -> None:
    from serve.vllm_plugin import w8a8

    assert w8a8.needed(), "vLLM starts W8A8 bases with LoRA by itself: the repair can go"


def test_the_repair_finds_a_packed_layers_device_and_is_needed_once(unpatched: Any) -> None:
    from vllm.lora.layers import base_linear

    from serve.vllm_plugin import w8a8

    w8a8.install()
    repaired = base_linear._get_lora_device
    assert repaired(Packed()) == torch.device("cpu")
    assert repaired(Packed().to("meta")) == torch.device("meta")
    assert repaired(torch.nn.Linear(2, 2, device="meta")) == torch.device("meta")
    assert not w8a8.needed()
    w8a8.install()
    assert base_linear._get_lora_device is repaired


def test_a_layer_of_an_unknown_kind_is_still_an_error(unpatched: Any) -> None:
    from vllm.lora.layers import base_linear

    from serve.vllm_plugin import w8a8

    w8a8.install()
    with pytest.raises(ValueError, match="Unsupported base layer"):
        base_linear._get_lora_device(torch.nn.Module())


def test_float32_activations_take_no_kernel_that_refuses_them(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.kernels.linear.scaled_mm import cpu
    from vllm.model_executor.layers import utils

    from serve.vllm_plugin import w8a8

    monkeypatch.setattr(cpu, "check_cpu_sgl_kernel", utils.check_cpu_sgl_kernel)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert cpu.check_cpu_sgl_kernel(64, 64, torch.int8), (
        "vLLM asks for the activations' type: the repair can go"
    )
    w8a8.install()
    assert not cpu.check_cpu_sgl_kernel(64, 64, torch.int8)
    monkeypatch.setattr(torch, "get_default_dtype", lambda: torch.bfloat16)
    assert cpu.check_cpu_sgl_kernel(64, 64, torch.int8)
    repaired = cpu.check_cpu_sgl_kernel
    w8a8.install()
    assert cpu.check_cpu_sgl_kernel is repaired
