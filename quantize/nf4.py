"""4-bit NormalFloat weights (QLoRA, arXiv:2305.14314, section 3) by bitsandbytes, on a CPU."""

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from quantize.card import WEIGHTS, checkpoint_files
from quantize.spec import QuantizeSpec


def write_nf4(parent: Path, draft: Path, spec: QuantizeSpec) -> None:
    """Write the parent's checkpoint to `draft` with the linear layers of its blocks in NF4.

    Embeddings (which the head shares), norms, tokenizer and chat template stay as they are.
    """
    model = AutoModelForCausalLM.from_pretrained(
        parent,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=spec.double_quantization,
            bnb_4bit_compute_dtype=getattr(torch, spec.compute_dtype),
        ),
        dtype=torch.bfloat16,
        device_map={"": "cpu"},
        local_files_only=True,
    )
    model.save_pretrained(draft, max_shard_size="1TB")
    for path in checkpoint_files(parent):
        if path.name != WEIGHTS and not (draft / path.name).exists():
            shutil.copyfile(path, draft / path.name)


def load_for_scoring(directory: Path, *, quantized: bool) -> Any:
    """Load a base with its weights expanded to float32, in which its loss is measured.

    Expanding NF4 once and computing in float32 scores exactly the published weights, without the rounding
    of a particular kernel. It is also the fast way: on an AVX2 machine (SmolLM2-135M, one thread, 1,024
    tokens) 4 s, against 28 s through bitsandbytes' own 4-bit kernels and 32 s in bfloat16.
    """
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, device_map={"": "cpu"}, local_files_only=True
    )
    if quantized:
        model = model.dequantize(dtype=torch.float32)
    return model.eval()
