"""bitsandbytes is imported without asking a model hub for a kernel.

On a CPU with AVX512-BF16, `bitsandbytes.backends.cpu.ops` (0.50.2) fetches `gemm_4bit_forward` from
a hub while it is imported, through the package `kernels`. That package is not installed, so each
process that imports bitsandbytes (training, quantizing, an engine with an NF4 base) would warn;
were it installed, code from the network would run. Upstream has no switch for it (bitsandbytes#2064
is the nearest issue). The kernel that is compiled into bitsandbytes' wheel computes either way.
"""

import importlib.util
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

ASKS = "bitsandbytes.backends.cpu.ops"


def install() -> None:
    """Keep the hub away from bitsandbytes when it is imported, if it is. Safe to call more than once."""
    if ASKS not in sys.modules and not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Finds the module that asks, once, and has it executed beside an empty hub."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != ASKS:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_beside_empty_hub(module: ModuleType) -> None:
                with _empty_hub():
                    execute(module)

            spec.loader.exec_module = execute_beside_empty_hub  # type: ignore[method-assign]
        return spec


@contextmanager
def _empty_hub() -> Iterator[None]:
    """Stands in for the package `kernels`, for one import only: others ask whether it is installed."""
    hub: Any = ModuleType("kernels")
    hub.get_kernel = lambda *_, **__: SimpleNamespace(gemm_4bit_forward=None)
    installed = sys.modules.get("kernels")
    sys.modules["kernels"] = hub
    try:
        yield
    finally:
        if installed is None:
            del sys.modules["kernels"]
        else:
            sys.modules["kernels"] = installed
