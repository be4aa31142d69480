"""bitsandbytes asks no hub for a kernel, and says nothing on import."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

IMPORT = """
import sys
from importlib.util import find_spec
from serve.vllm_plugin import kernel_hub

kernels_installed = find_spec("kernels") is not None
kernel_hub.install()
kernel_hub.install()
import bitsandbytes.functional
import torch

assert not any(isinstance(finder, kernel_hub._Finder) for finder in sys.meta_path)
assert "kernels" not in sys.modules
assert (find_spec("kernels") is not None) == kernels_installed
weights = torch.linspace(-1, 1, 64 * 64, dtype=torch.bfloat16).reshape(64, 64)
packed, state = bitsandbytes.functional.quantize_4bit(weights, quant_type="nf4")
row = torch.ones(1, 64, dtype=torch.bfloat16)
product = bitsandbytes.matmul_4bit(row, packed.t(), state)
expected = row @ bitsandbytes.functional.dequantize_4bit(packed, state).t()
assert torch.allclose(product.float(), expected.float(), atol=0.5), (product - expected).abs().max()
"""


def test_bitsandbytes_is_imported_in_silence_and_computes_with_the_kernel_of_its_wheel() -> None:
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", IMPORT], env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
