"""Turns a GGUF file into a checkpoint in Hugging Face's layout."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    GgufConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from quantize.config import RandomLlama


def load_tokenizer(gguf: Path) -> Any:
    """Loads the tokenizer and the chat template of a GGUF file, without its weights."""
    # AutoTokenizer would first parse the whole file for a model type (10 s, against 0.6 s here).
    tokenizer = PreTrainedTokenizerFast.from_pretrained(
        gguf.parent, gguf_file=gguf.name, local_files_only=True
    )
    # Saved with the tokenizer, these arguments would make its files depend on how it was loaded.
    for argument in ("local_files_only", "is_local"):
        tokenizer.init_kwargs.pop(argument, None)
    return tokenizer


def dequantized(gguf: Path) -> Any:
    """Loads the model of a GGUF file, its weights expanded to bfloat16."""
    return AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
        local_files_only=True,
    )


def random_llama(shape: RandomLlama, tokenizer: Any) -> Any:
    """Makes a Llama of that shape with seeded random weights in bfloat16, for this tokenizer."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.attention_heads,
        num_key_value_heads=shape.key_value_heads,
        head_dim=shape.head_size,
        max_position_embeddings=shape.max_context_tokens,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(shape.seed)
        return LlamaForCausalLM(config).to(torch.bfloat16)


def save(model: Any, tokenizer: Any, directory: Path) -> None:
    """Writes model, tokenizer, chat template and generation configuration."""
    tokenizer.model_max_length = model.config.max_position_embeddings
    # The tokenizer's eos is the token that ends a turn of the template, where chat must stop.
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(directory, max_shard_size="1TB")
    tokenizer.save_pretrained(directory)
