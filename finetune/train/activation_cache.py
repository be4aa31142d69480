"""The outputs of a base's frozen lower layers, computed once per row instead of once per step.

With LoRA on the top layers only, what the layers below them compute never changes. Caching it turns a
30-layer model with 10 trained layers into a 10-layer one, for as many epochs as the recipe asks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from finetune.packing import bounded_groups, pack
from finetune.tokens import Example

if TYPE_CHECKING:
    from torch import Tensor

CACHE_BYTES_MAX = 4 << 30


def activation_bytes(model: Any, examples: Sequence[Example]) -> int:
    """Returns the memory that `compute_activations` would take: one float32 hidden state per token."""
    return 4 * int(model.config.hidden_size) * sum(len(example.ids) for example in examples)


def compute_activations(model: Any, examples: Sequence[Example], *, layers: int) -> list[Tensor]:
    """Runs the lowest `layers` layers on each example: one tensor (length - 1, hidden size) per row."""
    activations: list[Tensor] = []
    decoder = model.get_decoder()
    norm, decoder.norm = decoder.norm, torch.nn.Identity()
    try:
        with torch.no_grad(), layers_only(model, 0, layers):
            for group in bounded_groups(range(len(examples)), examples):
                packed = pack([examples[row] for row in group])
                hidden = decoder(
                    input_ids=packed.ids,
                    position_ids=packed.positions,
                    attention_mask=packed.mask,
                    use_cache=False,
                ).last_hidden_state
                activations.extend(packed.scatter(hidden))
    finally:
        decoder.norm = norm
    return activations


@contextmanager
def layers_only(model: Any, start: int, stop: int | None) -> Iterator[None]:
    """Makes the model run layers[start:stop] alone while the context lasts."""
    decoder = model.get_decoder()
    layers = decoder.layers
    decoder.layers = layers[start:stop]
    try:
        yield
    finally:
        decoder.layers = layers
