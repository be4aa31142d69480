"""CPU LoRA: one matrix product per adapter in the batch, and none for tokens without an adapter.

Answers vLLM issue 48421: `lora/ops/torch_ops/lora_ops.py` indexes the stacked weights with −1 for
tokens that have no adapter, which Python reads as "the last slot", so in a mixed batch a request for
the bare base gets some customer's adapter. The same code also copies a whole LoRA matrix per token.

Here the rows of a step are grouped by slot once (`update_metadata`) and every linear layer then does
`y[rows] += s · (x[rows] Aᵀ) Bᵀ` per group (Hu et al. 2021, LoRA, eq. 3); rows of slot −1 are in no
group. Freed slots are in no group either, so what they still hold cannot be reached.
"""

from typing import Any


def needed() -> bool:
    """Whether the installed vLLM still gives adapterless tokens the last slot's delta."""
    import torch
    from vllm.lora.ops.torch_ops import bgmv_expand, bgmv_shrink

    hidden = torch.zeros(1, 1)
    output = torch.zeros(1, 1)
    nobody = torch.tensor([-1])
    bgmv_shrink(torch.ones(1, 1), torch.ones(1, 1, 1, 1), hidden, nobody, 1.0)
    bgmv_expand(hidden, torch.ones(1, 1, 1, 1), output, nobody)
    return bool(output.any())


def install() -> None:
    """Replace PunicaWrapperCPU's linear path and mask its remaining operators."""
    from vllm.lora.punica_wrapper import punica_cpu

    wrapper = punica_cpu.PunicaWrapperCPU
    if getattr(wrapper, "bespoke_repaired", False) or not needed():
        return
    wrapper.bespoke_repaired = True
    wrapper.update_metadata = _update_metadata
    wrapper.add_lora_linear = _add_lora_linear
    for name in ("bgmv_shrink", "bgmv_expand"):  # logits and embeddings still use these
        setattr(punica_cpu, name, _masked(getattr(punica_cpu, name)))
    wrapper._expand_prefill = wrapper._expand_decode  # the prefill form hides the indices; same result


def _update_metadata(self: Any, mapping: Any, *args: Any, **kwargs: Any) -> None:
    from vllm.lora.punica_wrapper.punica_base import PunicaWrapperBase

    PunicaWrapperBase.update_metadata(self, mapping, *args, **kwargs)
    slots = self.token_lora_indices
    first = int(slots[0]) if slots.numel() else -1
    if bool((slots == first).all()):
        self.bespoke_groups = [] if first < 0 else [(first, None)]
        return
    present = [int(slot) for slot in slots.unique() if slot >= 0]
    self.bespoke_groups = [(slot, (slots == slot).nonzero().squeeze(1)) for slot in present]


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
    """y (tokens, out) += scale · x (tokens, in) Aᵀ Bᵀ for each adapter in the batch.

    Each A is (slots, 1, rank, in), each B (slots, 1, out, rank); q, k and v are slices of one y.
    """
    rows_y = y.view(-1, y.shape[-1])
    rows_x = x.view(-1, x.shape[-1])
    for slot, rows in self.bespoke_groups:
        # Padding rows, where a step has any, lie behind the tokens that the mapping describes.
        index = slice(0, self.indices_len[0]) if rows is None else rows
        inputs = rows_x[index]
        offset = 0
        for a, b, width in zip(lora_a_stacked, lora_b_stacked, output_slices, strict=True):
            delta = (inputs @ a[slot, 0].T) @ b[slot, 0].T
            rows_y[index, offset : offset + width] += scale * delta[:, :width]
            offset += width


def _masked(operator: Any) -> Any:
    """`operator` with zero input for rows whose slot is −1, so that they get a zero delta."""

    def masked(inputs: Any, weights: Any, output: Any, indices: Any, *args: Any, **kwargs: Any) -> None:
        has_adapter = (indices >= 0).to(inputs.dtype).unsqueeze(1)
        operator(inputs * has_adapter, weights, output, indices.clamp(min=0), *args, **kwargs)

    return masked
