"""Training reads the token ids that the engine computes, and learns answers only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from finetune.data.dataset import Message
from finetune.errors import BaseUnusable, DataUnreadable
from finetune.tokens import encode, load_examples
from tests.support.finetune_samples import line, write_lines

CONVERSATIONS = {
    "one turn": (Message("user", "What is your name?"), Message("assistant", "I am Zuri.")),
    "with a system message": (
        Message("system", "Answer like a pirate."),
        Message("user", "Name?"),
        Message("assistant", "Arr, Zuri."),
    ),
    "two turns": (
        Message("user", "Open?"),
        Message("assistant", "Yes:\n\n- from 6\n- to 23"),
        Message("user", "3 €?"),
        Message("assistant", "12 euros 🚲"),
    ),
}


def served_prompt(tokenizer: Any, messages: tuple[Message, ...]) -> list[int]:
    """Renders and tokenizes like the engine: first the text, then its ids without added special tokens."""
    text = tokenizer.apply_chat_template(
        [{"role": message.role, "content": message.content} for message in messages],
        add_generation_prompt=True,
        tokenize=False,
    )
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_training_ids_up_to_each_answer_are_the_serving_prompt(
    tokenizer: Any, messages: tuple[Message, ...]
) -> None:
    example = encode(tokenizer, messages)
    for position, message in enumerate(messages):
        if message.role == "assistant":
            prompt = served_prompt(tokenizer, messages[:position])
            assert list(example.ids[: len(prompt)]) == prompt
            assert example.answer[len(prompt)]
            assert not example.answer[len(prompt) - 1]


@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_labels_are_the_answers_and_the_tokens_that_end_them(
    tokenizer: Any, messages: tuple[Message, ...]
) -> None:
    example = encode(tokenizer, messages)
    labelled = [token for token, is_answer in zip(example.ids, example.answer, strict=True) if is_answer]
    answers = [message.content for message in messages if message.role == "assistant"]
    assert tokenizer.decode(labelled) == "".join(f"{answer}<|im_end|>" for answer in answers)
    assert example.ids[-1] == tokenizer.eos_token_id


def test_the_template_adds_a_system_message_that_nobody_wrote(tokenizer: Any) -> None:
    """The template adds text, so prompts are rendered by it and never assembled by hand."""
    example = encode(tokenizer, CONVERSATIONS["one turn"])
    assert tokenizer.decode(example.ids).startswith("<|im_start|>system\nYou are a helpful AI assistant")


def test_long_rows_are_left_out_whole_and_counted(tokenizer: Any, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "train.jsonl", [line("Hi?", "Hello."), line("Hi?", "Hello. " * 100)])
    examples, too_long = load_examples(tokenizer, path, max_length_tokens=64)
    assert (len(examples), too_long) == (1, 1)


def test_a_file_that_was_not_prepared_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "train.jsonl", [line("Hi?", "Hello."), "{"])
    with pytest.raises(DataUnreadable, match="line 2: broken_json"):
        load_examples(tokenizer, path, max_length_tokens=64)


@pytest.mark.parametrize(
    ("template", "fault"),
    [
        (
            "{{ messages|length }}{% for m in messages %}{{ m.content }}{% endfor %}",
            "differently once answered",
        ),
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", "does not end an answer"),
    ],
)
def test_a_template_that_cannot_be_trained_on_is_refused(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, template: str, fault: str
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", template)
    with pytest.raises(BaseUnusable, match=fault):
        encode(tokenizer, CONVERSATIONS["one turn"])
