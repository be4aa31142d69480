"""Packs an adapter into one file: its layers' A and B one after another, as an engine's slots hold them.

vLLM reads an adapter's files within the engine's step. It parses the names of 420 tensors, joins q, k and v,
and scales B, and no other request gets a token meanwhile (80 ms for rank 8 on every layer of a 135M model).
A replica packs adapters beforehand in a thread. The step then only maps a file and copies.

    index.json   {"rank": r, "dtype": "float32", "layers": [numbers of the layers that it adapts]}
    weights.bin  for each of these layers: A (rank, slices, in), then B (rank, out), scaled by alpha / rank
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

INDEX_NAME, WEIGHTS_NAME = "index.json", "weights.bin"


@dataclass(frozen=True, slots=True)
class Layer:
    """Describes an adaptable layer of a worker: the checkpoint's modules that it joins, and their sizes."""

    parts: tuple[str, ...]
    width_in: int
    widths_out: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Layout:
    """Lists all adaptable layers of a worker, in its order."""

    layers: tuple[Layer, ...]
    dtype: str


class Unpackable(Exception):
    """Says that an adapter has weights for which the worker has no layer, or of another size."""


def pack(tensors: dict[str, Any], *, rank: int, scaling: float, layout: Layout, directory: Path) -> None:
    """Packs `tensors`, those of a PEFT checkpoint, into the existing `directory`.

    Raises Unpackable, before anything is written.
    """
    import torch

    _require_fitting(tensors, rank, layout)
    present = {name.removeprefix("base_model.model.").rpartition(".lora_")[0] for name in tensors}
    numbers = [n for n, layer in enumerate(layout.layers) if not present.isdisjoint(layer.parts)]
    # One buffer and one write: a small tensor costs more in calls than in bytes.
    size = sum(map(math.prod, _shapes(numbers, rank, layout)))
    flat = torch.zeros(size, dtype=getattr(torch, layout.dtype))
    for number, (whole_a, whole_b) in _views(flat, numbers, rank, layout).items():
        layer, edge = layout.layers[number], 0
        for i, (part, width) in enumerate(zip(layer.parts, layer.widths_out, strict=True)):
            if part in present:
                whole_a[:, i] = tensors[_name(part, "A")]
                torch.mul(
                    tensors[_name(part, "B")].to(flat.dtype).T, scaling, out=whole_b[:, edge : edge + width]
                )
            edge += width
    flat.view(torch.uint8).numpy().tofile(directory / WEIGHTS_NAME)
    index = {"rank": rank, "dtype": layout.dtype, "layers": numbers}
    (directory / INDEX_NAME).write_text(json.dumps(index))


def _require_fitting(tensors: dict[str, Any], rank: int, layout: Layout) -> None:
    left = set(tensors)
    for layer in layout.layers:
        for part, width in zip(layer.parts, layer.widths_out, strict=True):
            a, b = tensors.get(_name(part, "A")), tensors.get(_name(part, "B"))
            if a is None and b is None:
                continue
            if a is None or b is None or a.shape != (rank, layer.width_in) or b.shape != (width, rank):
                raise Unpackable(part)
            left -= {_name(part, "A"), _name(part, "B")}
    if left or not tensors:
        raise Unpackable(min(left, default="no weights"))


def _name(part: str, half: str) -> str:
    return f"base_model.model.{part}.lora_{half}.weight"


def _shapes(numbers: list[int], rank: int, layout: Layout) -> list[tuple[int, ...]]:
    shapes: list[tuple[int, ...]] = []
    for number in numbers:
        layer = layout.layers[number]
        shapes += [(rank, len(layer.parts), layer.width_in), (rank, sum(layer.widths_out))]
    return shapes


def _views(flat: Any, numbers: list[int], rank: int, layout: Layout) -> dict[int, tuple[Any, Any]]:
    shapes = _shapes(numbers, rank, layout)
    parts = flat.split([math.prod(shape) for shape in shapes])
    views = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
    return dict(zip(numbers, zip(views[::2], views[1::2], strict=True), strict=True))


@dataclass(frozen=True, slots=True)
class Packed:
    """Holds a packed adapter, mapped into memory: (A, B) by the number of the layer."""

    rank: int
    weights: dict[int, tuple[Any, Any]]

    @classmethod
    def open(cls, directory: Path, layout: Layout) -> "Packed":
        """Maps a packed adapter.

        Raises OSError, ValueError or KeyError if `pack` did not write it for `layout`.
        """
        import torch

        index = json.loads((directory / INDEX_NAME).read_text())
        rank, numbers = index["rank"], index["layers"]
        size = sum(map(math.prod, _shapes(numbers, rank, layout)))
        path, dtype = directory / WEIGHTS_NAME, getattr(torch, layout.dtype)
        if index["dtype"] != layout.dtype or path.stat().st_size != size * dtype.itemsize:
            raise ValueError(f"{directory.name}: packed for another layout")
        mapped = torch.from_file(str(path), shared=False, size=size, dtype=dtype)
        return cls(rank, _views(mapped, numbers, rank, layout))
