"""The frozen lower layers of a base, run once per row instead of once per step.

With LoRA on the top layers only, what the layers below them compute never changes. Keeping it turns a
30-layer model with 10 trained layers into a 10-layer one, for as many epochs as the recipe asks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from finetune.batch import bounded, pack
from finetune.tokens import Example

if TYPE_CHECKING:
    from torch import Tensor

STEM_BYTES_MAX = 4 << 30


def stem_bytes(model: Any, examples: Sequence[Example]) -> int:
    """Memory that `stem_outputs` would take: one float32 hidden state a token."""
    return 4 * int(model.config.hidden_size) * sum(len(example.ids) for example in examples)


def stem_outputs(model: Any, examples: Sequence[Example], *, cut: int) -> list[Tensor]:
    """What layer `cut - 1` gives for each example: one tensor (length - 1, hidden size) a row."""
    outputs: list[Tensor] = []
    decoder = model.get_decoder()
    norm, decoder.norm = decoder.norm, torch.nn.Identity()
    try:
        with torch.no_grad(), layers_only(model, 0, cut):
            for group in bounded(range(len(examples)), examples):
                batch = pack([examples[row] for row in group])
                hidden = decoder(
                    input_ids=batch.ids,
                    position_ids=batch.positions,
                    attention_mask=batch.mask,
                    use_cache=False,
                ).last_hidden_state
                outputs.extend(batch.scatter(hidden))
    finally:
        decoder.norm = norm
    return outputs


@contextmanager
def layers_only(model: Any, start: int, stop: int | None) -> Iterator[None]:
    """Make the model run layers[start:stop] alone while the context lasts."""
    decoder = model.get_decoder()
    layers = decoder.layers
    decoder.layers = layers[start:stop]
    try:
        yield
    finally:
        decoder.layers = layers
