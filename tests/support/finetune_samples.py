"""Conversations to train on, and adapters made by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from finetune.card import AdapterCard, Data, Gate, Libraries, Metrics, content_version
from finetune.hashing import file_sha256, json_sha256


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
