"""Compiles `kernel.cpp` once per machine with its C++ compiler, and calls it through ctypes.

vLLM's own CPU path needs the same compiler (torch.compile). Without one, or for another dtype, the caller
computes the same with PyTorch's operators, which is slower for many adapters with few rows each.
"""

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("kernel.cpp")
# Not -ffast-math: it would make the whole process flush denormals to zero when the library is loaded.
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fopenmp", "-shared", "-fPIC")


class _Shape(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_int64) for name in ("y_stride", "x_stride", "rank_max", "slices", "in", "out")
    )


@functools.cache
def library() -> ctypes.CDLL | None:
    """Returns the compiled kernel, or None where there is no compiler. Builds it the first time (2 s)."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        log.warning("no C++ compiler: CPU LoRA uses PyTorch's operators, slower with many adapters at once")
        return None
    try:
        return ctypes.CDLL(str(_build(compiler)))
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("the CPU LoRA kernel could not be built, PyTorch's operators are used: %s", error)
        return None


def _build(compiler: str) -> Path:
    # -march=native: a library may not run on another processor.
    inputs = (compiler.encode(), repr(FLAGS).encode(), SOURCE.read_bytes(), _processor())
    name = hashlib.sha256(b"\0".join(inputs)).hexdigest()[:24]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bespoke"
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    built = cache / f"lora-{name}.so"
    if not built.exists():
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            fresh = Path(scratch) / built.name
            subprocess.run(
                [compiler, *FLAGS, str(SOURCE), "-o", str(fresh)],
                check=True,
                capture_output=True,
                timeout=120,
            )
            fresh.rename(built)  # atomic: several workers may build at once
    return built


def _processor() -> bytes:
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
        return b"\n".join(line for line in lines[:40] if line.startswith((b"model name", b"flags")))
    return b""


@functools.cache
def _entry(dtype: str) -> Any:
    loaded = library()
    if loaded is None or dtype not in ("f32", "bf16"):
        return None
    entry = getattr(loaded, f"bespoke_lora_{dtype}")
    pointer = ctypes.c_void_p
    entry.argtypes = (*[pointer] * 7, ctypes.c_int64, ctypes.c_float, pointer, pointer)
    entry.restype = None
    return entry


def entry(dtype: Any) -> Any:
    """Returns the compiled function for tensors of `dtype`, or None."""
    return _entry({"torch.float32": "f32", "torch.bfloat16": "bf16"}.get(str(dtype), ""))


def add(
    function: Any,
    y: Any,
    x: Any,
    a: Any,
    b: Any,
    rows: tuple[Any, Any, Any],
    widths: tuple[int, ...],
    scale: float,
) -> None:
    """Adds scale · x[row] Aᵀ B to y[row], with A and B of the row's slot, up to the slot's rank.

    y (tokens, Σ widths), x (tokens, in); a (slots, rank, slices, in) and b (slots, rank, Σ widths), both
    contiguous; rows = int64 tensors (row, slot, rank), slots ascending.
    """
    shape = _Shape(y.stride(0), x.stride(0), a.shape[1], len(widths), a.shape[3], b.shape[2])
    numbers, slots, ranks = rows
    function(
        y.data_ptr(),
        x.data_ptr(),
        a.data_ptr(),
        b.data_ptr(),
        numbers.data_ptr(),
        slots.data_ptr(),
        ranks.data_ptr(),
        len(numbers),
        scale,
        _edges(widths),
        ctypes.byref(shape),
    )


@functools.cache
def _edges(widths: tuple[int, ...]) -> Any:
    ends = [sum(widths[:i]) for i in range(len(widths) + 1)]
    return (ctypes.c_int64 * len(ends))(*ends)
