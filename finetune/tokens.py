"""Conversations as token ids, rendered exactly as serving will render them, with the answers marked.

A chat template may add what nobody wrote (SmolLM2's inserts a default system message), so the only safe
prompt is the one that `apply_chat_template(messages, add_generation_prompt=True)` gives, as in the engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.data.rows import Conversation, Message, read_rows
from finetune.errors import BaseUnusable, DataUnreadable


@dataclass(frozen=True, slots=True)
class Example:
    """One conversation's token ids; `answer[i]` says whether token i is one the assistant must produce.

    That is every answer of the conversation with the token that ends it, so that the model learns to stop.
    The ids end with the last answer: what the template puts after it is never generated.
    """

    ids: tuple[int, ...]
    answer: tuple[bool, ...]

    @property
    def answer_tokens(self) -> int:
        return sum(self.answer)


def load_examples(tokenizer: Any, path: Path, *, max_length_tokens: int) -> tuple[list[Example], int]:
    """The examples of a prepared file, and how many rows were left out for their length.

    A long row is left out rather than cut: cutting takes away the answer, which comes last.

    Raises:
        DataUnreadable: the file holds a row that `prepare` would have dropped.
        BaseUnusable: see `encode`.
    """
    examples = []
    for row in read_rows(path):
        if not isinstance(row, Conversation):
            raise DataUnreadable(path, f"line {row.line}: {row.fault}; prepare the file first")
        examples.append(encode(tokenizer, row.messages))
    fitting = [example for example in examples if len(example.ids) <= max_length_tokens]
    return fitting, len(examples) - len(fitting)


def encode(tokenizer: Any, messages: Sequence[Message]) -> Example:
    """One conversation as an Example.

    Raises:
        BaseUnusable: the tokenizer's template cannot be trained on: a prompt is not the beginning of the
            conversation that continues it, or an answer does not end with the end-of-sequence token.
    """
    ids = prompt_ids(tokenizer, messages, answer_next=False)
    answer = [False] * len(ids)
    last = 0
    for position, message in enumerate(messages):
        if message.role != "assistant":
            continue
        prompt = prompt_ids(tokenizer, messages[:position], answer_next=True)
        if ids[: len(prompt)] != prompt:
            raise BaseUnusable(
                Path(tokenizer.name_or_path), "its chat template renders a prompt differently once answered"
            )
        if tokenizer.eos_token_id not in ids[len(prompt) :]:
            raise BaseUnusable(
                Path(tokenizer.name_or_path), "its chat template does not end an answer with the eos token"
            )
        last = ids.index(tokenizer.eos_token_id, len(prompt))
        answer[len(prompt) : last + 1] = [True] * (last + 1 - len(prompt))
    return Example(tuple(ids[: last + 1]), tuple(answer[: last + 1]))


def prompt_ids(tokenizer: Any, messages: Sequence[Message], *, answer_next: bool) -> list[int]:
    """The ids of messages as an engine sees them; with `answer_next`, up to where it starts to generate."""
    ids: list[int] = tokenizer.apply_chat_template(
        [{"role": message.role, "content": message.content} for message in messages],
        add_generation_prompt=answer_next,
        tokenize=True,
        return_dict=False,
    )
    return ids
