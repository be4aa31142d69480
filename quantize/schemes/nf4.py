"""4-bit NormalFloat weights (QLoRA, arXiv:2305.14314, section 3) by bitsandbytes, on a CPU."""

import shutil
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from quantize.card import WEIGHTS, checkpoint_files
from quantize.config import QuantizeConfig


def write_nf4(parent: Path, draft: Path, config: QuantizeConfig) -> None:
    """Writes the parent's checkpoint to `draft` with the linear layers of its blocks in NF4.

    Embeddings (which the head shares), norms, tokenizer and chat template stay as they are.
    """
    model = AutoModelForCausalLM.from_pretrained(
        parent,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=config.double_quantization,
            bnb_4bit_compute_dtype=getattr(torch, config.compute_dtype),
        ),
        dtype=torch.bfloat16,
        device_map={"": "cpu"},
        local_files_only=True,
    )
    model.save_pretrained(draft, max_shard_size="1TB")
    for path in checkpoint_files(parent):
        if path.name != WEIGHTS and not (draft / path.name).exists():
            shutil.copyfile(path, draft / path.name)
