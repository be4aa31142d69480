"""Validates the files of a LoRA adapter before the adapter is registered.

An engine that finds no layer for a weight silently serves the base's answers. One that cannot load a file
fails the tenant's first request. So the bytes are checked before any engine sees them.

Sources: PEFT's LoRA configuration reference; the safetensors format; vLLM's `PEFTHelper` and issue 34186.
"""

import json
import math
import os
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import regex  # unlike re, it takes a time-out

from finetune.card import ADAPTER_CONFIG_NAME, WEIGHTS_NAME
from serve.errors import RegistryError

_CONFIG_BYTES_MAX = 1 << 20
_HEADER_BYTES_MAX = 8 << 20
_BASE_HEADER_BYTES_MAX = 100_000_000  # the format's own limit
_WEIGHTS_BYTES_MAX = 4 << 30
_TENSORS_MAX = 20_000
_CHUNK_BYTES = 4 << 20
_PATTERN_TIMEOUT_S = 1.0

_PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}
_KEY = re.compile(r"base_model\.model\.([\w.]+)\.lora_([AB])\.weight", re.ASCII)
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.", re.ASCII)
_NOT_ADAPTABLE = re.compile(r"embed_tokens|lm_head|norm", re.IGNORECASE)
# PEFT changes the base itself to start from any other named initialization.
_PLAIN_STARTS = {"none", "true", "false", "gaussian", "eva", "orthogonal", "mica", "lora_ga"}
_UNSERVED = (
    *("use_dora", "use_qalora", "use_bdlora", "lora_bias", "fan_in_fan_out", "modules_to_save"),
    *("rank_pattern", "alpha_pattern", "trainable_token_indices", "target_parameters"),
    *("layer_replication", "alora_invocation_tokens", "arrow_config"),
)
_BITS = {
    "F64": 64, "I64": 64, "U64": 64, "C64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16,
    "I16": 16, "U16": 16, "BOOL": 8, "I8": 8, "U8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip
_UNPACKED = {"F32", "F16", "BF16", "I8", "F8_E4M3", "F8_E5M2"}
# The words to read them as (numpy has no bfloat16), and the exponent: NaN and Inf have all of its bits set.
_FLOATS = {"F32": ("<u4", 0x7F80_0000), "F16": ("<u2", 0x7C00), "BF16": ("<u2", 0x7F80)}

_Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LoraFiles:
    """Describes an adapter's files. `modules` are full paths, sorted; `bytes` is the size of the weights."""

    rank: int
    alpha: float
    modules: tuple[str, ...]
    tensors: int
    parameters: int
    bytes: int


class _Tensor(NamedTuple):
    """Locates one tensor of a safetensors file."""

    begin: int  # from the start of the file
    bytes: int
    dtype: str
    shape: _Shape


def inspect(directory: Path, base_dir: Path, *, max_rank: int) -> LoraFiles:
    """Validates the adapter in `directory` against the base in `base_dir`, and describes it.

    Per module, lora_A is (rank, in) and lora_B is (out, rank), where the base's weight is (out, in).
    Reads headers of the base and every byte of the adapter, in bounded memory.

    Raises RegistryError, which names the file, field or tensor, its value and what is needed.
    """
    try:
        _require_plain_files(directory)
        config = _read_config(directory / ADAPTER_CONFIG_NAME, max_rank)
        linears = decoder_linears(base_dir)
        with (directory / WEIGHTS_NAME).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            _require(size <= _WEIGHTS_BYTES_MAX, WEIGHTS_NAME, f"{size} bytes, at most {_WEIGHTS_BYTES_MAX}")
            tensors = _read_header(file, WEIGHTS_NAME, _HEADER_BYTES_MAX)
            count = len(tensors)
            _require(0 < count <= _TENSORS_MAX, WEIGHTS_NAME, f"{count} tensors, at most {_TENSORS_MAX}")
            modules = _require_fitting_pairs(tensors, linears, config["r"])
            _require_targets(config, modules)
            _require_finite_effect(file, tensors, modules)
    except (OSError, RecursionError) as error:
        raise RegistryError(f"{directory.name}: cannot be read: {error}") from error
    parameters = sum(math.prod(tensor.shape) for tensor in tensors.values())
    return LoraFiles(config["r"], float(config["lora_alpha"]), tuple(modules), count, parameters, size)


def decoder_linears(base_dir: Path) -> dict[str, tuple[int, int]]:
    """Returns (out, in) of each linear layer of the decoder layers by module path, plain or quantized.

    compressed-tensors keeps a packed weight's shape in `weight_shape`, bitsandbytes in its quant state.

    Raises RegistryError if there are none or a file is broken, OSError if one cannot be read.
    """
    linears: dict[str, tuple[int, int]] = {}
    for path in base_dir.glob("model*.safetensors"):
        with path.open("rb") as file:
            for name, tensor in _read_header(file, path.name, _BASE_HEADER_BYTES_MAX).items():
                module, _, kind = name.rpartition(".")
                shape: Any = None
                if kind == "weight" and tensor.dtype in _UNPACKED:
                    shape = tensor.shape
                elif kind == "weight_shape" and tensor.dtype in ("I32", "I64"):
                    words = _read(file, tensor.begin, min(tensor.bytes, 16))
                    shape = np.frombuffer(words, "<i4" if tensor.dtype == "I32" else "<i8").tolist()
                elif kind in ("bitsandbytes__nf4", "bitsandbytes__fp4"):
                    module = module.removesuffix(".weight.quant_state")
                    shape = _json_object(_read(file, tensor.begin, tensor.bytes), name).get("shape")
                adaptable = _LAYER.search(module) and not _NOT_ADAPTABLE.search(module)
                if adaptable and _are_sizes(shape) and len(shape) == 2:
                    linears[module] = (shape[0], shape[1])
    _require(linears, base_dir.name, "holds no model*.safetensors with 2-D weights of decoder layers")
    return linears


def target_suffixes(base_dir: Path) -> list[str]:
    """Returns the last names in the paths of `decoder_linears`, sorted: what an adapter may target."""
    return sorted({module.rpartition(".")[2] for module in decoder_linears(base_dir)})


def _require(condition: object, where: str, problem: str) -> None:
    if not condition:
        raise RegistryError(f"{where}: {problem}")


def _require_plain_files(directory: Path) -> None:
    _require(not directory.is_symlink(), directory.name, "is a symbolic link")
    for entry in directory.iterdir():
        _require(entry.is_file() and not entry.is_symlink(), _excerpt(entry.name), "is not a plain file")
        suffix = entry.suffix.lower()
        weights = suffix in _PICKLES or (suffix == ".safetensors" and entry.name != WEIGHTS_NAME)
        _require(not weights, _excerpt(entry.name), f"weights may only be in {WEIGHTS_NAME}")
    for name in (ADAPTER_CONFIG_NAME, WEIGHTS_NAME):
        _require((directory / name).exists(), name, "is missing")


def _read_config(path: Path, max_rank: int) -> dict[str, Any]:
    """Reads PEFT's LoraConfig, and refuses fields that change the computation and are not served."""
    size = path.stat().st_size
    _require(size <= _CONFIG_BYTES_MAX, path.name, f"{size} bytes, at most {_CONFIG_BYTES_MAX} are allowed")
    config = _json_object(path.read_bytes(), path.name)

    def need(field: str, condition: bool, expected: str) -> None:
        _require(condition, path.name, f"{field} is {_excerpt(config.get(field))}, expected {expected}")

    need("peft_type", config.get("peft_type") == "LORA", "'LORA'")
    need("task_type", config.get("task_type") in (None, "CAUSAL_LM"), "'CAUSAL_LM' or nothing")
    rank, alpha, start = config.get("r"), config.get("lora_alpha", 0), config.get("init_lora_weights")
    need("r", type(rank) is int and 1 <= rank <= max_rank, f"an integer from 1 to {max_rank}")
    need("lora_alpha", type(alpha) in (int, float) and 0 < alpha <= sys.float_info.max, "finite, above 0")
    need("bias", config.get("bias", "none") == "none", "'none'")
    need("use_rslora", isinstance(config.get("use_rslora", False), bool), "true or false")
    need("init_lora_weights", str(start).lower() in _PLAIN_STARTS, "one that leaves the base as it is")
    for field in _UNSERVED:
        need(field, not config.get(field), "nothing, because it is not served")
    return config


def _read_header(file: BinaryIO, where: str, bytes_max: int) -> dict[str, _Tensor]:
    """Reads the header of a safetensors file: an 8-byte length, JSON, then the tensors without gaps."""
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    sane = size >= 8 and length <= min(bytes_max, size - 8)
    _require(sane, where, f"its header has {length} bytes, the file {size}, at most {bytes_max} are allowed")
    _require(_read(file, 8, 1) == b"{", where, "its header is not a JSON object")
    header = _json_object(_read(file, 8, length), where)
    metadata = header.pop("__metadata__", {})
    texts = isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    _require(texts, where, "__metadata__ must hold only texts")
    end = 8 + length
    tensors = {name: _tensor(entry, f"{where}: {_excerpt(name)}", end) for name, entry in header.items()}
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1]):
        _require(tensor.begin == end, where, f"{_excerpt(name)} begins at {tensor.begin}, expected {end}")
        end += tensor.bytes
    _require(end == size, where, f"its tensors end at byte {end}, the file at {size}")
    return tensors


def _tensor(entry: Any, where: str, data_begin: int) -> _Tensor:
    keys = {"dtype", "shape", "data_offsets"}
    _require(isinstance(entry, dict) and set(entry) == keys, where, f"expected {', '.join(sorted(keys))}")
    dtype, shape, offsets = str(entry["dtype"]), entry["shape"], entry["data_offsets"]
    _require(dtype in _BITS, where, f"dtype {_excerpt(dtype)} is unknown")
    sizes = _are_sizes(shape) and _are_sizes(offsets) and len(offsets) == 2
    fills = sizes and (offsets[1] - offsets[0]) * 8 == math.prod(shape) * _BITS[dtype]
    _require(fills, where, f"{dtype} of shape {_excerpt(shape)} does not fill the bytes {_excerpt(offsets)}")
    return _Tensor(data_begin + offsets[0], offsets[1] - offsets[0], dtype, tuple(shape))


def _require_fitting_pairs(
    tensors: dict[str, _Tensor], linears: dict[str, tuple[int, int]], rank: int
) -> list[str]:
    """Returns the modules' paths: each is a linear layer of the base, and both halves have its shapes."""
    modules = set()
    for name, tensor in tensors.items():
        if _NOT_ADAPTABLE.search(name):
            raise RegistryError(f"{_excerpt(name)}: only linear layers of the decoder layers may be adapted")
        key = _KEY.fullmatch(name)
        if key is None:
            raise RegistryError(f"{_excerpt(name)}: expected {_name('<module>', 'A')} or lora_B.weight")
        module, half = key.groups()
        _require(module in linears, name, f"the base has no linear layer {module}")
        other = _name(module, "B" if half == "A" else "A")
        _require(other in tensors, name, f"its other half, {other}, is missing")
        rows, columns = linears[module]
        needed = (rank, columns) if half == "A" else (rows, rank)
        if tensor.shape != needed:
            raise RegistryError(f"{name}: shape {tensor.shape}, but the base needs {needed} at rank {rank}")
        _require(tensor.dtype in _FLOATS, name, f"dtype {tensor.dtype}, expected {' or '.join(_FLOATS)}")
        modules.add(module)
    return sorted(modules)


def _require_targets(config: dict[str, Any], modules: list[str]) -> None:
    """Requires that the configuration names the modules and layers with weights, by PEFT's matching rules."""
    targets, layers = config.get("target_modules"), config.get("layers_to_transform")
    where, field = ADAPTER_CONFIG_NAME, f"target_modules is {_excerpt(targets)}"
    if isinstance(targets, str):
        _require_match(targets, modules, f"{where}: {field}")
    else:
        names = isinstance(targets, list) and targets and all(isinstance(name, str) for name in targets)
        _require(names, where, f"{field}, expected names or a regular expression")
        targeted = unused = frozenset(targets or ())
        for module in modules:
            suffixes = {module.split(".", dots)[-1] for dots in range(module.count(".") + 1)}
            _require(suffixes & targeted, _name(module, "A"), f"{module} is not in target_modules")
            unused -= suffixes
        _require(not unused, where, f"target_modules: there are no weights for {_excerpt(sorted(unused))}")
    present = {int(layer[1]) for module in modules if (layer := _LAYER.search(module))}
    numbers = layers if isinstance(layers, list) else [] if layers is None else [layers]
    agree = not numbers or (all(type(number) is int for number in numbers) and present == set(numbers))
    _require(agree, where, f"layers_to_transform is {_excerpt(layers)}, expected {_excerpt(sorted(present))}")


def _require_match(pattern: str, modules: list[str], where: str) -> None:
    _require(len(pattern) <= 4096, where, "has more than 4096 characters")
    deadline = time.monotonic() + _PATTERN_TIMEOUT_S
    try:
        for module in modules if pattern.lower() != "all-linear" else ():
            matches = regex.fullmatch(pattern, module, timeout=max(deadline - time.monotonic(), 1e-3))
            _require(matches, where, f"{module}, which has weights, does not match")
    except (TimeoutError, regex.error, RecursionError, OverflowError, ValueError) as error:
        raise RegistryError(f"{where}: is no regular expression, or a slow one: {error}") from error


def _require_finite_effect(file: BinaryIO, tensors: dict[str, _Tensor], modules: list[str]) -> None:
    nonzero = {name for name, tensor in tensors.items() if _has_nonzero(file, name, tensor)}
    effect = any({_name(module, "A"), _name(module, "B")} <= nonzero for module in modules)
    _require(effect, WEIGHTS_NAME, "lora_B or lora_A of every module is zero: the adapter changes nothing")


def _has_nonzero(file: BinaryIO, name: str, tensor: _Tensor) -> bool:
    word, exponent = _FLOATS[tensor.dtype]
    nonzero = False
    for offset in range(0, tensor.bytes, _CHUNK_BYTES):
        chunk = _read(file, tensor.begin + offset, min(_CHUNK_BYTES, tensor.bytes - offset))
        bits = np.frombuffer(chunk, dtype=word)
        _require(((bits & exponent) != exponent).all(), name, "holds NaN or Inf, expected finite numbers")
        nonzero |= bool((bits << 1).any())  # without the sign: -0.0 is zero
    return nonzero


def _read(file: BinaryIO, begin: int, count: int) -> bytes:
    # Not a memory map: if a file shrinks meanwhile, this raises, and a memory map kills the process.
    file.seek(begin)
    data = file.read(count)
    _require(len(data) == count, file.name, f"{len(data)} of {count} bytes at {begin}: it was shortened")
    return data


def _json_object(raw: bytes, where: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        # Readers differ in which of two equal keys they take. The checked one must be the served one.
        _require(len(dict(pairs)) == len(pairs), where, "a key occurs twice")
        return dict(pairs)

    try:
        value: dict[str, Any] = json.loads(raw.decode(), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise RegistryError(f"{where}: is not JSON: {error}") from error
    _require(isinstance(value, dict), where, "is not a JSON object")
    return value


def _are_sizes(value: Any) -> bool:
    short = isinstance(value, list | tuple) and len(value) <= 8
    return short and all(type(item) is int and 0 <= item < 1 << 63 for item in value)


def _name(module: str, half: str) -> str:
    return f"base_model.model.{module}.lora_{half}.weight"


def _excerpt(value: object) -> str:
    return ascii(value)[:200]  # a file may hold control characters, and very long values
