"""Checks that packed weights are those of the adapter's files."""

import json
from pathlib import Path
from typing import Any

import pytest

from serve.vllm_plugin.packed import (
    INDEX_NAME,
    WEIGHTS_NAME,
    Layer,
    Layout,
    Packed,
    Unpackable,
    pack,
)

torch = pytest.importorskip("torch")

RANK, SCALING = 3, 2.5
QKV = Layer(("layers.0.q_proj", "layers.0.k_proj", "layers.0.v_proj"), 6, (8, 4, 4))
DOWN = Layer(("layers.0.down_proj",), 10, (6,))
NEXT = Layer(("layers.1.q_proj",), 6, (8,))
LAYOUT = Layout((QKV, DOWN, NEXT), "float32")


def weights(part: str, width_in: int, width_out: int) -> dict[str, Any]:
    return {
        f"base_model.model.{part}.lora_A.weight": torch.randn(RANK, width_in),
        f"base_model.model.{part}.lora_B.weight": torch.randn(width_out, RANK),
    }


@pytest.fixture
def tensors() -> dict[str, Any]:
    """q and v, not k, of a joined layer; the whole of the second; nothing of the third."""
    torch.manual_seed(0)
    return (
        weights("layers.0.q_proj", 6, 8)
        | weights("layers.0.v_proj", 6, 4)
        | weights("layers.0.down_proj", 10, 6)
    )


def packed(tensors: dict[str, Any], layout: Layout, directory: Path) -> Packed:
    pack(tensors, rank=RANK, scaling=SCALING, layout=layout, directory=directory)
    return Packed.open(directory, layout)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_what_is_opened_are_the_joined_and_scaled_weights(
    tensors: dict[str, Any], dtype: str, tmp_path: Path
) -> None:
    kind = getattr(torch, dtype)
    opened = packed(tensors, Layout(LAYOUT.layers, dtype), tmp_path)
    assert opened.rank == RANK
    assert sorted(opened.weights) == [0, 1], "a layer that the adapter does not have takes no room"
    for number, layer in enumerate(LAYOUT.layers[:2]):
        a, b = opened.weights[number]
        assert (a.dtype, b.dtype) == (kind, kind)
        assert a.shape == (RANK, len(layer.parts), layer.width_in)
        assert b.shape == (RANK, sum(layer.widths_out))
        for i, (part, slice_) in enumerate(zip(layer.parts, b.split(layer.widths_out, 1), strict=True)):
            name = f"base_model.model.{part}.lora_"
            if f"{name}A.weight" in tensors:
                torch.testing.assert_close(a[:, i], tensors[f"{name}A.weight"].to(kind))
                scaled = (tensors[f"{name}B.weight"].to(kind) * SCALING).T
                torch.testing.assert_close(slice_, scaled, rtol=1e-2 if dtype != "float32" else 0, atol=0)
            else:
                assert not a[:, i].any()
                assert not slice_.any()


def test_the_product_of_what_is_packed_is_the_adapters_delta(tensors: dict[str, Any], tmp_path: Path) -> None:
    a, b = packed(tensors, LAYOUT, tmp_path).weights[1]
    x = torch.randn(5, DOWN.width_in)
    half_a, half_b = (tensors[f"base_model.model.layers.0.down_proj.lora_{half}.weight"] for half in "AB")
    torch.testing.assert_close((x @ a[:, 0].T) @ b, SCALING * (x @ half_a.T @ half_b.T))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base_model.model.layers.9.q_proj.lora_A.weight": (RANK, 6)}, r"layers\.9\.q_proj"),
        ({"layers.0.q_proj.lora_A.weight": (RANK, 6)}, r"layers\.0\.q_proj\.lora_A"),
        ({"base_model.model.layers.0.q_proj.lora_magnitude_vector": (8,)}, "magnitude"),
        ({"base_model.model.layers.0.q_proj.lora_B.weight": None}, r"layers\.0\.q_proj"),
        ({"base_model.model.layers.0.q_proj.lora_A.weight": None}, r"layers\.0\.q_proj"),
        ({"base_model.model.layers.0.q_proj.lora_A.weight": (RANK, 7)}, r"layers\.0\.q_proj"),
        ({"base_model.model.layers.0.q_proj.lora_A.weight": (RANK + 1, 6)}, r"layers\.0\.q_proj"),
        ({"base_model.model.layers.0.q_proj.lora_B.weight": (9, RANK)}, r"layers\.0\.q_proj"),
    ],
    ids=[
        *("unknown layer", "unknown prefix", "unknown kind", "no B", "no A", "A of another width"),
        *("A of another rank", "B of another width"),
    ],
)
def test_what_the_worker_has_no_place_for_is_not_packed(
    tensors: dict[str, Any], change: dict[str, tuple[int, ...] | None], message: str, tmp_path: Path
) -> None:
    for name, shape in change.items():
        if shape is None:
            del tensors[name]
        else:
            tensors[name] = torch.ones(shape)
    with pytest.raises(Unpackable, match=message):
        pack(tensors, rank=RANK, scaling=SCALING, layout=LAYOUT, directory=tmp_path)
    assert not list(tmp_path.iterdir())


def test_no_weights_are_not_packed(tmp_path: Path) -> None:
    with pytest.raises(Unpackable, match="no weights"):
        pack({}, rank=RANK, scaling=SCALING, layout=LAYOUT, directory=tmp_path)


def test_a_file_of_another_size_is_not_opened(tensors: dict[str, Any], tmp_path: Path) -> None:
    packed(tensors, LAYOUT, tmp_path)
    path = tmp_path / WEIGHTS_NAME
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match="packed for another layout"):
        Packed.open(tmp_path, LAYOUT)


def test_weights_packed_for_another_dtype_are_not_opened(tensors: dict[str, Any], tmp_path: Path) -> None:
    packed(tensors, LAYOUT, tmp_path)
    with pytest.raises(ValueError, match="packed for another layout"):
        Packed.open(tmp_path, Layout(LAYOUT.layers, "bfloat16"))
    assert json.loads((tmp_path / INDEX_NAME).read_text())["dtype"] == "float32"
