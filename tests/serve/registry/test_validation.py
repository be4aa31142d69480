"""Checks that an adapter whose files do not fit its base is refused, and that each refusal says why."""

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from serve.errors import RegistryError
from serve.registry.validation import inspect
from tests.support.lora_samples import (
    HIDDEN,
    INTERMEDIATE,
    LINEARS,
    RANK,
    TYPES,
    UP,
    UP_A,
    UP_B,
    Tensors,
    lora,
    write_adapter,
    write_base,
    write_raw,
    write_safetensors,
)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_base(tmp_path / "base")


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "adapter")


def refusal(adapter: Path, base: Path) -> str:
    with pytest.raises(RegistryError) as caught:
        inspect(adapter, base, max_rank=8)
    return str(caught.value)


def test_a_good_adapter_is_described(adapter: Path, base: Path) -> None:
    files = inspect(adapter, base, max_rank=RANK)
    assert (files.rank, files.alpha, files.tensors) == (RANK, 4.0, 8)
    assert files.modules == tuple(sorted(LINEARS))
    assert files.parameters == sum(RANK * (rows + columns) for rows, columns in LINEARS.values())
    assert files.bytes == (adapter / "adapter_model.safetensors").stat().st_size


# The base's shapes


def bitsandbytes(kind: str, module: str, shape: tuple[int, int]) -> Tensors:
    state = json.dumps({"quant_type": kind, "blocksize": 64, "shape": shape}).encode()
    return {
        f"{module}.weight": np.zeros((math.prod(shape) // 2, 1), np.uint8),
        f"{module}.weight.absmax": np.zeros(1, np.float32),
        f"{module}.weight.quant_state.bitsandbytes__{kind}": np.frombuffer(state, np.uint8),
    }


def compressed(dtype: str, module: str, shape: tuple[int, int]) -> Tensors:
    return {
        f"{module}.weight_packed": np.zeros((shape[0], 1), np.int32),
        f"{module}.weight_scale": np.zeros((shape[0], 1), np.float16),
        f"{module}.weight_shape": np.array(shape, dtype),
    }


QUANTIZERS: dict[str, Callable[[str, tuple[int, int]], Tensors]] = {
    "nf4": lambda module, shape: bitsandbytes("nf4", module, shape),
    "fp4": lambda module, shape: bitsandbytes("fp4", module, shape),
    "int8": lambda module, shape: {f"{module}.weight": np.zeros(shape, np.int8)},
    "packed with 64-bit shape": lambda module, shape: compressed("i8", module, shape),
    "packed with 32-bit shape": lambda module, shape: compressed("i4", module, shape),
}


@pytest.mark.parametrize("quantizer", QUANTIZERS.values(), ids=QUANTIZERS)
def test_shapes_are_compared_with_the_linear_layer_that_a_quantized_weight_stands_for(
    quantizer: Callable[[str, tuple[int, int]], Tensors], adapter: Path, tmp_path: Path
) -> None:
    base = tmp_path / "quantized"
    base.mkdir()
    parts = [quantizer(module, shape) for module, shape in LINEARS.items()]
    save_file({name: array for part in parts for name, array in part.items()}, base / "model.safetensors")
    assert inspect(adapter, base, max_rank=8).modules == tuple(sorted(LINEARS))
    write_adapter(adapter, lora() | {UP_B: np.ones((INTERMEDIATE - 1, RANK), "f4")})
    assert refusal(adapter, base).startswith(f"{UP_B}: shape (9, 2), but the base needs (10, 2)")


def test_a_base_in_shards_is_one_base(adapter: Path, tmp_path: Path) -> None:
    base = tmp_path / "shards"
    base.mkdir()
    names = []
    for number, (module, shape) in enumerate(LINEARS.items(), 1):
        names.append(f"model-{number:05}-of-{len(LINEARS):05}.safetensors")
        save_file({f"{module}.weight": np.ones(shape, np.float16)}, base / names[-1])
    assert inspect(adapter, base, max_rank=8).tensors == 8
    (base / names[-1]).unlink()
    assert "the base has no linear layer model.layers.1.mlp.up_proj" in refusal(adapter, base)


def test_a_base_without_weights_is_reported_as_that(adapter: Path, tmp_path: Path) -> None:
    assert "holds no model*.safetensors" in refusal(adapter, tmp_path / "nowhere")


# Files


@pytest.mark.parametrize(
    "name",
    ["adapter_model.bin", "adapter_model.pt", "x.pth", "x.pkl", "x.CKPT", "new_embeddings.safetensors"],
)
def test_weights_in_any_other_file_are_refused(name: str, adapter: Path, base: Path) -> None:
    (adapter / name).write_bytes(b"")
    assert refusal(adapter, base) == f"'{name}': weights may only be in adapter_model.safetensors"


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", "card.json"])
def test_a_symbolic_link_is_refused(name: str, adapter: Path, base: Path, tmp_path: Path) -> None:
    shutil.move(adapter / name, tmp_path / name)
    (adapter / name).symlink_to(tmp_path / name)
    assert refusal(adapter, base) == f"'{name}': is not a plain file"


def test_a_link_to_an_adapter_and_a_folder_inside_one_are_refused(
    adapter: Path, base: Path, tmp_path: Path
) -> None:
    (tmp_path / "link").symlink_to(adapter)
    assert "is a symbolic link" in refusal(tmp_path / "link", base)
    (adapter / "checkpoint-10").mkdir()
    assert "is not a plain file" in refusal(adapter, base)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_missing_file_is_named(name: str, adapter: Path, base: Path) -> None:
    (adapter / name).unlink()
    assert refusal(adapter, base) == f"{name}: is missing"


def test_a_directory_that_is_not_there_is_refused(base: Path, tmp_path: Path) -> None:
    assert "cannot be read" in refusal(tmp_path / "nowhere", base)


@pytest.mark.parametrize(
    ("name", "size"), [("adapter_model.safetensors", 4 << 30), ("adapter_config.json", 1 << 20)]
)
def test_a_file_above_its_bound_is_refused_unread(name: str, size: int, adapter: Path, base: Path) -> None:
    os.truncate(adapter / name, size + 1)
    assert f"{name}: {size + 1} bytes, at most {size}" in refusal(adapter, base)


# The configuration


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("peft_type", value) for value in ("LOHA", None)),
        *(("task_type", value) for value in ("SEQ_CLS", 1)),
        *(("r", value) for value in (0, -1, 9, True, 2.0, "2", None)),
        *(("lora_alpha", value) for value in (0, -1, math.inf, math.nan, True, "4", None, 10**400)),
        *(("bias", value) for value in ("all", "lora_only", None)),
        *(("use_rslora", value) for value in ("false", None)),
        *(("init_lora_weights", value) for value in ("pissa", "pissa_niter_4", "olora", "loftq")),
        *((flag, True) for flag in ("use_dora", "fan_in_fan_out", "lora_bias", "use_qalora")),
        *((names, ["lm_head"]) for names in ("modules_to_save", "target_parameters")),
        *((numbers, [1]) for numbers in ("trainable_token_indices", "alora_invocation_tokens")),
        *((pattern, {"q_proj": 4}) for pattern in ("rank_pattern", "alpha_pattern", "use_bdlora")),
        ("layer_replication", [[0, 1]]),
        *(("target_modules", value) for value in (None, [], "", 3, [3], {"q_proj": 1})),
        *(("target_modules", value) for value in ("(", ".*q_proj", r"[a-z]+", "a" * 5000)),
        *(("layers_to_transform", value) for value in ([0], 1, 0, [0, 1, 2], ["0"], [[0]], "all")),
    ],
)
def test_a_configuration_that_is_not_served_as_trained_is_refused(
    field: str, value: Any, adapter: Path, base: Path
) -> None:
    write_adapter(adapter, **{field: value})
    message = refusal(adapter, base)
    assert message.startswith(f"adapter_config.json: {field} ")
    assert len(message) < 1000


@pytest.mark.parametrize(
    "changes",
    [
        {"use_rslora": True, "lora_alpha": 0.5},
        {"task_type": None, "use_dora": False, "modules_to_save": None, "rank_pattern": {}},
        {"init_lora_weights": "gaussian"},
        {"layers_to_transform": [1, 0]},
        {"layers_to_transform": []},
        {"target_modules": "all-linear"},
        {"target_modules": r"model\.layers\.\d+\.(self_attn|mlp)\.(q|up)_proj"},
        {"target_modules": ["self_attn.q_proj", "model.layers.0.mlp.up_proj", "layers.1.mlp.up_proj"]},
    ],
)
def test_a_configuration_that_is_served_as_trained_passes(
    changes: dict[str, Any], adapter: Path, base: Path
) -> None:
    inspect(write_adapter(adapter, **changes), base, max_rank=8)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "null",
        "{",
        '{"r": 2, "r": 3}',
        "[" * 5000,
        '{"r": ' + "[" * 400 + "]" * 400 + "}",
        "\ufeff{}",
    ],
)
def test_a_configuration_that_is_no_plain_json_object_is_refused(
    text: str, adapter: Path, base: Path
) -> None:
    (adapter / "adapter_config.json").write_text(text)
    assert refusal(adapter, base)


def test_a_pattern_that_hardly_ends_is_stopped(
    adapter: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.registry.validation._PATTERN_TIMEOUT_S", 0.1)
    write_adapter(adapter, target_modules=r"(.|.)+[!?]")
    assert "or a slow one" in refusal(adapter, base)


# Keys and shapes


def renamed(old: str, new: str) -> Tensors:
    return {name.replace(old, new): array for name, array in lora().items()}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (renamed("base_model.model.", ""), "expected base_model.model.<module>.lora_A.weight"),
        (renamed("lora_A.weight", "lora_A.default.weight"), "expected base_model.model."),
        (lora() | {UP.format("magnitude_vector"): np.ones(2, "f4")}, "expected base_model.model."),
        (renamed("model.layers.1", "layers.1"), "the base has no linear layer layers.1."),
        (renamed("layers.1", "layers.2"), "the base has no linear layer model.layers.2."),
        (renamed("model.layers.1.self_attn.q_proj", "projector.linear"), "no linear layer projector.linear"),
        (lora() | {"base_model.model.lm_head.lora_A.weight": np.ones((2, 6), "f4")}, "lm_head"),
        (renamed("layers.1.mlp.up_proj.lora_A.weight", "embed_tokens.lora_embedding_A"), "embed_tokens"),
        (renamed("0.mlp.up_proj", "0.input_layernorm"), "input_layernorm"),
        (lora() | {"\x1b[31m" + "x" * 500: np.ones(1, "f4")}, r"'\x1b[31mxxx"),
        ({name: array for name, array in lora().items() if name != UP_A}, f"{UP_B}: its other half, {UP_A}"),
        ({name: array for name, array in lora().items() if name != UP_B}, f"{UP_A}: its other half, {UP_B}"),
        (lora() | {UP_B: np.ones((2, 10), "f4")}, f"{UP_B}: shape (2, 10), but the base needs"),
        (lora() | {UP_A: np.ones((RANK + 1, HIDDEN), "f4")}, f"{UP_A}: shape (3, 6), but the base needs"),
        (lora() | {UP_A: np.ones(RANK * HIDDEN, "f4")}, f"{UP_A}: shape (12,), but the base needs (2, 6)"),
        (lora() | {UP_A: np.ones((RANK, HIDDEN), "f8")}, f"{UP_A}: dtype F64, expected F32 or F16 or BF16"),
        ({}, "0 tensors, at most 20000"),
    ],
)  # fmt: skip
def test_a_tensor_that_no_layer_of_the_base_takes_is_named(
    tensors: Tensors, message: str, adapter: Path, base: Path
) -> None:
    assert message in refusal(write_adapter(adapter, tensors), base)


def test_a_target_without_weights_is_refused_because_the_base_would_answer(adapter: Path, base: Path) -> None:
    write_adapter(adapter, target_modules=["q_proj", "up_proj", "k_proj"])
    assert "target_modules: there are no weights for ['k_proj']" in refusal(adapter, base)


def test_weights_that_are_no_target_are_refused(adapter: Path, base: Path) -> None:
    write_adapter(adapter, target_modules=["q_proj", "proj"])
    assert "mlp.up_proj is not in target_modules" in refusal(adapter, base)


# Values


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_refused_and_its_tensor_named(
    dtype: str, value: float, adapter: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.registry.validation._CHUNK_BYTES", 8)  # the value lies in a late chunk
    tensors = {name: as_dtype(array, dtype) for name, array in lora().items()}
    dtypes = dict.fromkeys(tensors, dtype)
    write_safetensors(adapter / "adapter_model.safetensors", tensors, dtypes)
    assert inspect(adapter, base, max_rank=8).tensors == 8
    bad = lora()[UP_B]
    bad[-2, 1] = value
    write_safetensors(adapter / "adapter_model.safetensors", tensors | {UP_B: as_dtype(bad, dtype)}, dtypes)
    assert refusal(adapter, base) == f"{UP_B}: holds NaN or Inf, expected finite numbers"


def as_dtype(array: np.ndarray[Any, Any], dtype: str) -> np.ndarray[Any, Any]:
    if dtype == "BF16":  # the upper half of a float32
        return (array.view(np.uint32) >> 16).astype(np.uint16)
    return array.astype(TYPES[dtype])


@pytest.mark.parametrize("half", ["A", "B"])
@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_an_adapter_that_changes_nothing_is_refused(
    half: str, zero: float, adapter: Path, base: Path
) -> None:
    zeros = {name: np.full_like(array, zero) for name, array in lora().items() if f"lora_{half}" in name}
    assert "the adapter changes nothing" in refusal(write_adapter(adapter, lora() | zeros), base)
    zeros.popitem()
    inspect(write_adapter(adapter, lora() | zeros), base, max_rank=8)


# The safetensors file


def entry(dtype: Any, shape: Any, *offsets: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"a": entry("F32", [1], 0, 4), "b": entry("U8", [6], 2, 8)}, "'b' begins at"),
        ({"a": entry("F32", [1], 0, 4), "b": entry("U8", [3], 5, 8)}, "'b' begins at"),
        ({"a": entry("F32", [1], 0, 4)}, "its tensors end at"),
        ({"a": entry("F32", [4], 0, 16)}, "its tensors end at"),
        ({"a": entry("F32", [2], 0, 4)}, "does not fill"),
        ({"a": entry("F32", [-1, -2], 0, 8)}, "does not fill"),
        ({"a": entry("F32", [2], 8, 0)}, "does not fill"),
        ({"a": entry("F32", [2], 0, 8, 8)}, "does not fill"),
        ({"a": entry("F32", [10**30, 10**30], 0, 8)}, "does not fill"),
        ({"a": entry("F32", [1] * 9999, 0, 8)}, "does not fill"),
        ({"a": entry("F32", [True, 2], 0, 8)}, "does not fill"),
        ({"a": entry("F31", [2], 0, 8)}, "dtype 'F31' is unknown"),
        ({"a": entry(["F32"], [2], 0, 8)}, "is unknown"),
        ({"a": {"dtype": "F32", "shape": [2]}}, "expected data_offsets, dtype, shape"),
        ({"a": []}, "expected data_offsets, dtype, shape"),
        ({"__metadata__": {"format": 1}, "a": entry("F32", [2], 0, 8)}, "__metadata__"),
        ({"__metadata__": "pt", "a": entry("F32", [2], 0, 8)}, "__metadata__"),
        ([], "is not a JSON object"),
        (b"{", "is not JSON"),
        (b"{\xff}", "is not JSON"),
        (b" {}", "is not a JSON object"),
        (b'{"a": 1, "a": 1}', "a key occurs twice"),
    ],
)  # fmt: skip
def test_a_header_that_lies_is_refused(header: Any, message: str, adapter: Path, base: Path) -> None:
    write_raw(adapter / "adapter_model.safetensors", header, bytes(8))
    text = refusal(adapter, base)
    assert text.startswith("adapter_model.safetensors: ")
    assert message in text


@pytest.mark.parametrize("length", [9, (8 << 20) + 1, 1 << 63])
def test_a_header_longer_than_the_file_or_the_bound_is_not_read(
    length: int, adapter: Path, base: Path
) -> None:
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + b"{}")
    if length < 1 << 30 and length > 9:
        os.truncate(path, length + 8)
    assert f"its header has {length} bytes" in refusal(adapter, base)


def test_too_many_tensors_are_refused(adapter: Path, base: Path) -> None:
    header = {str(number): entry("F32", [0], 0, 0) for number in range(20_001)}
    write_raw(adapter / "adapter_model.safetensors", header)
    assert "20001 tensors, at most 20000" in refusal(adapter, base)


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    home = tmp_path_factory.mktemp("fuzz")
    return write_adapter(home / "adapter"), write_base(home / "base")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_broken_bytes_are_refused_or_harmless(
    name: str, fuzzed: tuple[Path, Path], data: st.DataObject
) -> None:
    adapter, base = fuzzed
    path = write_adapter(adapter) / name
    raw = bytearray(path.read_bytes())
    # Most of the danger is in the length and the header.
    place = st.integers(0, len(raw) - 1) | st.integers(0, min(len(raw), 400) - 1)
    for _ in range(data.draw(st.integers(0, 2), label="changes")):
        raw[data.draw(place, label="place")] = data.draw(st.integers(0, 255), label="byte")
    path.write_bytes(raw[: data.draw(st.just(len(raw)) | place, label="length")])
    try:
        files = inspect(adapter, base, max_rank=8)
    except RegistryError:
        return
    with safe_open(adapter / "adapter_model.safetensors", framework="numpy") as weights:
        assert len(weights.keys()) == files.tensors
