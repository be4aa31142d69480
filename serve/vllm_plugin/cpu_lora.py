"""Computes LoRA on CPUs: one matrix product per adapter in the batch, none for tokens without an adapter.

It repairs vLLM issue 48421. `lora/ops/torch_ops/lora_ops.py` indexes the stacked weights with −1 for tokens
without an adapter, which Python reads as "the last slot". So in a mixed batch a request for the bare base
gets some customer's adapter. The same code also copies a whole LoRA matrix per token.

Here `y += (x Aᵀ) Bᵀ` (Hu et al. 2021, LoRA, eq. 3) is computed per adapter, on the rows that the step's
`Batch` names. Rows of slot −1 are in no group, and neither are freed slots. q, k and v (gate and up) share
one product for their Aᵀ. Only the rank of a slot's adapter is computed, and only in layers that it adapts.
"""

from dataclasses import dataclass, field
from typing import Any

from serve.vllm_plugin import kernel, upstream
from serve.vllm_plugin.batch import Batch


def install() -> bool:
    """Replaces PunicaWrapperCPU's linear path and masks its other operators; False if vLLM needs neither."""
    return upstream.replace_cpu_lora(_update_metadata, _add_lora_linear, _masked)


class Stack(tuple[Any, ...]):
    """Holds vLLM's tuple of one weight per slice, each a view of one tensor, `whole`.

    whole of A: (slots, rank, slices, in), so that the first r ranks of all slices are one matrix;
    whole of B: (slots, rank, out), each of whose rows is read from start to end.
    `used` are the slots in which the layer has weights.
    """

    whole: Any
    used: set[int]


def stack(lora_a: tuple[Any, ...], lora_b: tuple[Any, ...]) -> tuple[Stack, Stack]:
    """Makes zero stacks with the shapes of vLLM's A (slots, 1, rank, in) and B (slots, 1, out, rank)."""
    slots, _, rank, width = lora_a[0].shape
    outs = [b.shape[2] for b in lora_b]
    whole_a = lora_a[0].new_zeros(slots, rank, len(lora_a), width)
    whole_b = lora_b[0].new_zeros(slots, rank, sum(outs))
    a = Stack(whole_a[:, :, i].unsqueeze(1) for i in range(len(lora_a)))
    b = Stack(part.transpose(1, 2).unsqueeze(1) for part in whole_b.split(outs, dim=2))
    a.whole, b.whole = whole_a, whole_b
    a.used = b.used = set()
    return a, b


@dataclass
class State:
    """Holds what a punica wrapper does not know itself: its slots' ranks and its layers' dtype."""

    ranks: dict[int, int] = field(default_factory=dict)
    dtype: Any = None


def state(wrapper: Any) -> State:
    """Returns the state of `wrapper`, made on first use."""
    wrapper_state: State = wrapper.__dict__.setdefault("bespoke_state", State())
    return wrapper_state


def _update_metadata(self: Any, mapping: Any, *args: Any, **kwargs: Any) -> None:
    upstream.base_update_metadata(self, mapping, *args, **kwargs)
    wrapper_state = state(self)
    compiled = kernel.entry(wrapper_state.dtype) is not None
    self.bespoke_batch = Batch.of(self.token_lora_indices, wrapper_state.ranks, compiled=compiled)


def _add_lora_linear(
    self: Any,
    y: Any,
    x: Any,
    lora_a_stacked: tuple[Any, ...],
    lora_b_stacked: tuple[Any, ...],
    scale: float,
    output_slices: tuple[int, ...],
    *,
    buffer: Any = None,
    **kwargs: Any,
) -> None:
    """Adds scale · x (tokens, in) Aᵀ Bᵀ to y (tokens, out) for each adapter in the batch."""
    batch: Batch = self.bespoke_batch
    if not batch.slots:
        return
    if not isinstance(lora_a_stacked, Stack) or not isinstance(lora_b_stacked, Stack):
        # A layer that was not registered, or one whose slices differ.
        lora_a_stacked, lora_b_stacked = _stacked(lora_a_stacked, lora_b_stacked)
    elif batch.slots.isdisjoint(lora_a_stacked.used):
        return  # no adapter in this batch has this layer
    batch.add(
        y.view(-1, y.shape[-1]),
        x.view(-1, x.shape[-1]),
        lora_a_stacked.whole,
        lora_b_stacked.whole,
        output_slices,
        scale,
    )


def _stacked(lora_a: tuple[Any, ...], lora_b: tuple[Any, ...]) -> tuple[Stack, Stack]:
    a, b = stack(lora_a, lora_b)
    for copies, originals in ((a, lora_a), (b, lora_b)):
        for copy, original in zip(copies, originals, strict=True):
            copy.copy_(original)
    return a, b


def _masked(operator: Any) -> Any:
    """Wraps `operator`: rows whose slot is −1 get zero input, so they get a zero delta."""

    def masked(inputs: Any, weights: Any, output: Any, indices: Any, *args: Any, **kwargs: Any) -> None:
        has_adapter = (indices >= 0).to(inputs.dtype).unsqueeze(1)
        operator(inputs * has_adapter, weights, output, indices.clamp(min=0), *args, **kwargs)

    return masked
