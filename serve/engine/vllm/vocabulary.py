"""Knows the bytes of each token of a model."""

from typing import Any


class Vocabulary:
    """Gives each token's bytes, also those of tokens that are part of a character.

    A special token's bytes are its name. vLLM leaves special tokens out of a text, unless asked otherwise.
    """

    def __init__(self, tokenizer: Any) -> None:
        import xgrammar

        # xgrammar's long ones are of a type of its own, which no frame can carry.
        decoded = xgrammar.TokenizerInfo.from_huggingface(tokenizer).decoded_vocab
        self._tokens = [bytes(token) for token in decoded]
        added = tokenizer.added_tokens_decoder
        self._special = frozenset(number for number, token in added.items() if token.special)

    def token(self, number: int) -> bytes:
        return self._tokens[number] if number < len(self._tokens) else b""

    def is_special(self, number: int) -> bool:
        return number in self._special
