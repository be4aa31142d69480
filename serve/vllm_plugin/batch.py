"""Groups the rows of one engine step by adapter slot, and computes the LoRA product over them."""

from typing import Any

from serve.vllm_plugin import kernel

# From here on PyTorch's matrix product beats the kernel's row-wise one (a prompt, say).
MANY_ROWS = 48


class Batch:
    """Holds which rows of a step belong to which slot. Make it once per step with `of`.

    Slots with many rows are `runs` of (slot, rank, rows), a matrix product each, where rows is a slice or
    an index tensor. All others share one call of the kernel: `few` are int64 tensors (row, slot, rank).
    """

    def __init__(
        self, slots: frozenset[int], runs: list[tuple[int, int, Any]], few: tuple[Any, Any, Any] | None
    ) -> None:
        self.slots = slots
        self._runs = runs
        self._few = few

    @classmethod
    def of(cls, slots: Any, ranks: dict[int, int], *, compiled: bool) -> "Batch":
        """Groups `slots`, an int64 tensor (tokens,): each row's slot, or −1 for none.

        `ranks` are those of the slots' adapters. A slot without one counts with its full rank, which is
        slower, not wrong. `compiled` says whether the kernel exists for the dtype in use.
        """
        rows: dict[int, list[int]] = {}
        for row, slot in enumerate(slots.tolist()):
            if slot >= 0:
                rows.setdefault(slot, []).append(row)
        runs, few = [], []
        for slot, slot_rows in sorted(rows.items()):
            rank = ranks.get(slot, 0)
            if compiled and len(slot_rows) < MANY_ROWS:
                few += [(row, slot, rank) for row in slot_rows]
            else:
                runs.append((slot, rank, _index(slot_rows, slots)))
        if not few:
            return cls(frozenset(rows), runs, None)
        row_numbers, slot_numbers, rank_numbers = (
            slots.new_tensor(column) for column in zip(*few, strict=True)
        )
        return cls(frozenset(rows), runs, (row_numbers, slot_numbers, rank_numbers))

    def add(self, y: Any, x: Any, a: Any, b: Any, widths: tuple[int, ...], scale: float) -> None:
        """Adds scale · x (rows, in) Aᵀ Bᵀ to y (rows, Σ widths), whose slices have `widths`.

        a is (slots, rank, slices, in), b is (slots, rank, Σ widths); see `cpu_lora.Stack`.
        """
        for slot, rank, rows in self._runs:
            rank = rank or a.shape[1]
            hidden = x[rows] @ a[slot, :rank].flatten(0, 1).T
            if isinstance(rows, slice):
                _expand(y[rows], hidden, b[slot, :rank], widths, scale)
            else:
                delta = y.new_zeros(len(hidden), y.shape[1])
                _expand(delta, hidden, b[slot, :rank], widths, scale)
                y.index_add_(0, rows, delta)
        if self._few is not None:
            kernel.add(kernel.entry(y.dtype), y, x, a, b, self._few, widths, scale)


def _expand(y: Any, hidden: Any, b: Any, widths: tuple[int, ...], scale: float) -> None:
    """Adds scale · hidden (rows, rank · slices) b (rank, Σ widths) to y (rows, Σ widths), slice by slice."""
    slices, left = len(widths), 0
    for i, width in enumerate(widths):
        y[:, left : left + width].addmm_(hidden[:, i::slices], b[:, left : left + width], alpha=scale)
        left += width


def _index(rows: list[int], like: Any) -> Any:
    """Returns `rows` as a slice if they are neighbours, which needs no copy, else as a tensor."""
    if rows[-1] - rows[0] == len(rows) - 1:
        return slice(rows[0], rows[-1] + 1)
    return like.new_tensor(rows)
