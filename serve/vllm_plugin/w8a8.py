"""W8A8 bases start with LoRA on.

Answers no numbered vLLM issue that we found: on CPU, oneDNN packs an INT8 layer's weight away and leaves
`weight` None, and `lora/layers/utils.py:_get_lora_device` then fails on `weight.device` at start.
"""

from typing import Any


def needed() -> bool:
    """Whether the installed vLLM still fails for a layer whose weight was packed away."""
    from vllm.lora.layers import utils

    try:
        utils._get_lora_device(_packed_layer())
    except AttributeError:
        return True
    return False


def install() -> None:
    """Give LoRA tensors of packed layers the device of the layer's other tensors."""
    from vllm.lora.layers import base_linear, utils

    if not needed():
        return
    original = utils._get_lora_device

    def device_of(base_layer: Any) -> Any:
        import torch

        if getattr(base_layer, "weight", base_layer) is not None:
            return original(base_layer)
        tensors = (*base_layer.parameters(), *base_layer.buffers())
        return tensors[0].device if tensors else torch.device("cpu")

    # base_linear has imported the name; other layer kinds (embeddings, experts) are not packed so.
    utils._get_lora_device = base_linear._get_lora_device = device_of


def _packed_layer() -> Any:
    import torch

    layer = torch.nn.Module()
    layer.weight = None
    return layer
