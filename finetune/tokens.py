"""Renders conversations as token ids exactly as the engine will, and marks the answers.

A chat template may add text that nobody wrote (SmolLM2's inserts a default system message). The only safe
prompt is therefore the engine's: `apply_chat_template(messages, add_generation_prompt=True)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.data.dataset import Conversation, Message, read_rows
from finetune.errors import BaseUnusable, DataUnreadable


@dataclass(frozen=True, slots=True)
class Example:
    """One conversation's token ids; `answer[i]` is true if the assistant must produce token i.

    True are the tokens of every answer and the token that ends it, so that the model learns to stop. The ids
    end with the last answer, because the engine never generates what the template puts after it.
    """

    ids: tuple[int, ...]
    answer: tuple[bool, ...]

    @property
    def answer_tokens(self) -> int:
        return sum(self.answer)


def load_examples(tokenizer: Any, path: Path, *, max_length_tokens: int) -> tuple[list[Example], int]:
    """Loads the examples of a prepared file, and counts the rows left out for their length.

    A long row is left out whole: cutting it would remove the answer, which comes last.

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
    """Encodes one conversation.

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
    """Renders messages as the engine does. With `answer_next` the ids end where generation starts."""
    ids: list[int] = tokenizer.apply_chat_template(
        [{"role": message.role, "content": message.content} for message in messages],
        add_generation_prompt=answer_next,
        tokenize=True,
        return_dict=False,
    )
    return ids
