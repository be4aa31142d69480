"""Lets W8A8 bases start with LoRA on.

We found no numbered vLLM issue for it. On CPU, oneDNN packs an INT8 layer's weight away and leaves `weight`
None. `lora/layers/utils.py:_get_lora_device` then fails on `weight.device` at start.
"""

from typing import Any

from serve.vllm_plugin import upstream


def needed() -> bool:
    """Finds out whether the installed vLLM still fails for a layer whose weight was packed away."""
    return upstream.device_lookup_fails(_packed_layer())


def install() -> None:
    """Gives LoRA tensors of packed layers the device of the layer's other tensors."""
    if needed():
        upstream.replace_device_lookup(_finding_packed_layers)


def _finding_packed_layers(original: Any) -> Any:
    def device_of(base_layer: Any) -> Any:
        import torch

        if getattr(base_layer, "weight", base_layer) is not None:
            return original(base_layer)
        tensors = (*base_layer.parameters(), *base_layer.buffers())
        return tensors[0].device if tensors else torch.device("cpu")

    return device_of


def _packed_layer() -> Any:
    import torch

    layer = torch.nn.Module()
    layer.weight = None
    return layer
