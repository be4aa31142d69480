"""Checks the repaired CPU LoRA path against the formula, and vLLM without the repair."""

import importlib
from collections.abc import Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")

SLOTS, RANK, SIZE, WIDTHS = 2, 4, 8, (8, 4)


class Wrapper:
    """Stands in for PunicaWrapperCPU, as far as the linear path reads it."""

    def __init__(self, slots: list[int], ranks: dict[int, int], *, compiled: bool) -> None:
        from serve.vllm_plugin.batch import Batch

        self.bespoke_batch = Batch.of(torch.tensor(slots), ranks, compiled=compiled)


@pytest.fixture
def weights() -> tuple[Any, Any]:
    torch.manual_seed(0)
    a = tuple(torch.randn(SLOTS, 1, RANK, SIZE) for _ in WIDTHS)
    b = tuple(torch.randn(SLOTS, 1, width, RANK) for width in WIDTHS)
    return a, b


def expected(
    slots: list[int], x: Any, y: Any, a: Any, b: Any, scale: float, widths: tuple[int, ...] = WIDTHS
) -> Any:
    expected_output = y.clone()
    for row, slot in enumerate(slots):
        if slot >= 0:
            expected_output[row] += scale * torch.cat(
                [b[i][slot, 0] @ (a[i][slot, 0] @ x[row]) for i in range(len(widths))]
            )
    return expected_output


MANY = [row % 3 - 1 for row in range(180)]


@pytest.mark.parametrize("compiled", [False, True], ids=["pytorch", "kernel"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "slots",
    [[0, 0, 0], [1, -1, 0, 1, -1], [-1, -1], [-1, 1], [0, 1, 1, 1, 1, 1, 0, -1, 1], MANY, [0] * 70 + [1]],
    ids=lambda slots: ",".join(map(str, slots))[:20],
)
def test_each_token_gets_its_own_adapters_delta_and_base_tokens_none(
    slots: list[int], dtype: str, compiled: bool, weights: Any
) -> None:
    from serve.vllm_plugin import kernel
    from serve.vllm_plugin.cpu_lora import _add_lora_linear

    kind = getattr(torch, dtype)
    if compiled and kernel.entry(kind) is None:
        pytest.skip("no C++ compiler here")
    a, b = (tuple(part.to(kind) for part in side) for side in weights)
    x, y = torch.randn(len(slots), SIZE).to(kind), torch.randn(len(slots), sum(WIDTHS)).to(kind)
    expected_output = expected(slots, x, y, a, b, 0.5)
    _add_lora_linear(Wrapper(slots, {}, compiled=compiled), y, x, a, b, 0.5, WIDTHS)
    close = {"rtol": 1.6e-2, "atol": 1e-1} if dtype == "bfloat16" else {}
    torch.testing.assert_close(y, expected_output, **close)


@pytest.mark.parametrize("compiled", [False, True], ids=["pytorch", "kernel"])
@pytest.mark.parametrize(("size", "widths"), [(37, (19, 5, 5)), (576, (1537,))])
def test_sizes_that_fill_no_register_and_ranks_below_the_largest_count_as_well(
    size: int, widths: tuple[int, ...], compiled: bool
) -> None:
    from serve.vllm_plugin.cpu_lora import _add_lora_linear

    torch.manual_seed(1)
    slots, ranks = [2, 0, 2, -1, 2, 2, 1, 2], {0: 1, 1: 3, 2: RANK}
    a = tuple(torch.randn(3, 1, RANK, size) for _ in widths)
    b = tuple(torch.randn(3, 1, width, RANK) for width in widths)
    for slot, rank in ranks.items():
        for part in a:
            part[slot, 0, rank:] = 0
    x, y = torch.randn(len(slots), size), torch.randn(len(slots), sum(widths))
    expected_output = expected(slots, x, y, a, b, 1.0, widths)
    _add_lora_linear(Wrapper(slots, ranks, compiled=compiled), y, x, a, b, 1.0, widths)
    torch.testing.assert_close(y, expected_output, rtol=1e-4, atol=1e-4)


@pytest.fixture
def punica() -> Iterator[Any]:
    """Gives PunicaWrapperCPU as vLLM ships it, and repairs it again afterwards."""
    from vllm.lora.punica_wrapper import punica_cpu

    from serve.vllm_plugin import register

    yield importlib.reload(punica_cpu)
    register()


def metadata(wrapper: Any, slots: list[int]) -> None:
    from vllm.lora.layers import LoRAMapping

    mapping = LoRAMapping(
        tuple(slot + 1 for slot in slots), tuple(slot + 1 for slot in slots), is_prefill=True
    )
    wrapper.update_metadata(mapping, [1, 2], SLOTS, 100)


def run_linear(punica: Any, slots: list[int], weights: Any) -> tuple[Any, Any]:
    a, b = weights
    wrapper = punica.PunicaWrapperCPU(64, 8, "cpu", max_loras=SLOTS)
    metadata(wrapper, slots)
    x, y = torch.randn(len(slots), SIZE), torch.zeros(len(slots), sum(WIDTHS))
    expected_output = expected(slots, x, y, a, b, 1.0)
    wrapper.add_lora_linear(y, x, a, b, 1.0, WIDTHS)
    return y, expected_output


def test_vllm_without_the_repair_gives_base_tokens_somebody_elses_adapter(punica: Any, weights: Any) -> None:
    from serve.vllm_plugin.upstream import adapterless_rows_get_a_delta

    assert adapterless_rows_get_a_delta(), "vLLM has fixed 48421: the repair can go"
    output, expected_output = run_linear(punica, [0, -1, 1], weights)
    assert not torch.allclose(output[1], expected_output[1])


def test_the_installed_repair_gives_every_token_what_the_formula_says(punica: Any, weights: Any) -> None:
    from serve.vllm_plugin import register

    register()
    register()  # vLLM calls it in every process, perhaps more than once
    output, expected_output = run_linear(punica, [0, -1, 1, -1], weights)
    torch.testing.assert_close(output, expected_output)


def test_the_repaired_logits_path_leaves_base_tokens_alone(punica: Any, weights: Any) -> None:
    from serve.vllm_plugin import register

    register()
    a, b = weights
    wrapper = punica.PunicaWrapperCPU(64, 8, "cpu", max_loras=SLOTS)
    metadata(wrapper, [1, -1])
    x, y = torch.randn(2, SIZE), torch.zeros(2, WIDTHS[0])
    wrapper.add_lora_logits(y, x, a[0], b[0], 1.0)
    torch.testing.assert_close(y[0], b[0][1, 0] @ (a[0][1, 0] @ x[0]))
    assert not y[1].any()
