"""A base is identified by its card, or without a card by its weights."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from finetune.base_model import base_sha256, load_model, load_tokenizer
from finetune.errors import BaseUnusable


def test_a_base_without_a_card_is_identified_by_its_weights(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    assert base_sha256(tmp_path) == hashlib.sha256(b"weights").hexdigest()


def test_a_card_identifies_its_base(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "card.json").write_text('{"weights_sha256": "' + "a" * 64 + '"}')
    assert base_sha256(tmp_path) == "a" * 64


@pytest.mark.parametrize("card", ["{}", "[]", "{", '{"weights_sha256": 3}', '{"weights_sha256": "abc"}'])
def test_a_card_without_a_hash_is_an_error(tmp_path: Path, card: str) -> None:
    (tmp_path / "card.json").write_text(card)
    with pytest.raises(BaseUnusable):
        base_sha256(tmp_path)


def test_a_directory_that_holds_no_base_is_an_error(tmp_path: Path) -> None:
    for use in (base_sha256, load_tokenizer, load_model):
        with pytest.raises(BaseUnusable):
            use(tmp_path)
