"""Running the frozen layers beforehand changes no logit."""

from __future__ import annotations

from typing import Any

import torch

from finetune.packing import answer_logits, pack
from finetune.tokens import Example
from finetune.train.activation_cache import activation_bytes, compute_activations, layers_only


def test_running_the_lower_layers_first_gives_the_same_logits(model: Any, examples: list[Example]) -> None:
    activations = compute_activations(model, examples, layers=3)
    packed = pack(examples)
    with torch.no_grad():
        whole = answer_logits(model, packed)
        with layers_only(model, 3, None):
            upper = answer_logits(model, packed, packed.gather(activations))
    torch.testing.assert_close(upper, whole)
    assert len(model.get_decoder().layers) == 4


def test_the_predicted_memory_is_that_of_the_activations(model: Any, examples: list[Example]) -> None:
    activations = compute_activations(model, examples, layers=3)
    stored = sum(tensor.numel() * tensor.element_size() for tensor in activations)
    unpredicted_last_tokens = 4 * model.config.hidden_size * len(examples)
    assert activation_bytes(model, examples) == stored + unpredicted_last_tokens
