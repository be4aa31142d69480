"""Identifies and loads the base checkpoint that an adapter is trained on."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from finetune.errors import BaseUnusable
from finetune.hashing import file_sha256

_CARD_NAME = "card.json"
_WEIGHTS_NAME = "model.safetensors"


def base_sha256(directory: Path) -> str:
    """Returns the base's identity: `weights_sha256` of its card, or without a card the hash of its weights.

    Raises:
        BaseUnusable: there is neither, or the card has no valid weights_sha256.
    """
    card = directory / _CARD_NAME
    weights = directory / _WEIGHTS_NAME
    if card.is_file():
        try:
            digest = json.loads(card.read_text(encoding="utf-8"))["weights_sha256"]
        except (ValueError, KeyError, TypeError) as error:
            raise BaseUnusable(directory, f"{_CARD_NAME} has no weights_sha256") from error
        if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
            raise BaseUnusable(directory, f"weights_sha256 in {_CARD_NAME} is not a SHA-256")
        return digest
    if not weights.is_file():
        raise BaseUnusable(directory, f"neither {_CARD_NAME} nor {_WEIGHTS_NAME} is there")
    return file_sha256(weights)


def load_tokenizer(directory: Path) -> Any:
    """Loads the base's tokenizer.

    Raises:
        BaseUnusable: it cannot be loaded, has no chat template, or no end-of-sequence token.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError) as error:
        raise BaseUnusable(directory, f"its tokenizer does not load: {error}") from error
    if not tokenizer.chat_template or tokenizer.eos_token_id is None:
        raise BaseUnusable(directory, "its tokenizer has no chat template or no end-of-sequence token")
    return tokenizer


def load_model(directory: Path) -> Any:
    """Loads the base as a transformers causal LM in float32, with frozen weights.

    CPUs without AVX-512 multiply bfloat16 at a fifth of float32's speed (6 against 28 GFLOP/s for
    512x1536x576 on an AVX2 core). In float32, sums differ between machines by their order only.

    Raises:
        BaseUnusable: it cannot be loaded.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="sdpa", local_files_only=True
        )
    except (OSError, ValueError) as error:
        raise BaseUnusable(directory, f"its weights do not load: {error}") from error
    return model.requires_grad_(False).eval()
