"""Lets W8A8 bases start with LoRA on, and compute in float32 on CPUs with AMX.

We found no numbered vLLM issue for either. On CPU, oneDNN packs an INT8 layer's weight away and leaves
`weight` None. `lora/layers/utils.py:_get_lora_device` then fails on `weight.device` at start. With AMX, vLLM
takes a kernel for INT8 weights without asking for the activations' type; it refuses float32 ("expect A to be
bfloat16 or half"), and the first request ends the engine.
"""

from typing import Any

from serve.vllm_plugin import upstream


def needed() -> bool:
    """Finds out whether the installed vLLM still fails for a layer whose weight was packed away."""
    return upstream.device_lookup_fails(_packed_layer())


def install() -> None:
    """Gives LoRA tensors of packed layers the device of the layer's other tensors; keeps float32 from AMX."""
    if needed():
        upstream.replace_device_lookup(_finding_packed_layers)
    if not getattr(upstream.int8_kernel_choice(), "asks_activations", False):
        upstream.replace_int8_kernel_choice(_asking_activations)


def _finding_packed_layers(original: Any) -> Any:
    def device_of(base_layer: Any) -> Any:
        import torch

        if getattr(base_layer, "weight", base_layer) is not None:
            return original(base_layer)
        tensors = (*base_layer.parameters(), *base_layer.buffers())
        return tensors[0].device if tensors else torch.device("cpu")

    return device_of


def _asking_activations(original: Any) -> Any:
    def choose(n: int, k: int, dtype: Any) -> bool:
        import torch

        # vLLM loads a model with its activations' type as PyTorch's default.
        fits = dtype != torch.int8 or torch.get_default_dtype() in (torch.bfloat16, torch.float16)
        return bool(fits and original(n, k, dtype))

    choose.asks_activations = True  # type: ignore[attr-defined]
    return choose


def _packed_layer() -> Any:
    import torch

    layer = torch.nn.Module()
    layer.weight = None
    return layer
