"""A checkpoint is portable safetensors, and its tokenizer and chat template are the source's."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from quantize.card import checkpoint_files


def test_the_checkpoint_is_safetensors_in_bfloat16_and_names_no_path_of_this_machine(tiny: Path) -> None:
    assert {path.suffix for path in checkpoint_files(tiny)} == {".json", ".jinja", ".safetensors"}
    model = AutoModelForCausalLM.from_pretrained(tiny, local_files_only=True)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    for path in checkpoint_files(tiny):
        if path.suffix != ".safetensors":
            assert str(tiny.parent) not in path.read_text()
            assert "site-packages" not in path.read_text()


def test_chat_stops_at_the_token_that_ends_a_turn(tiny: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny, local_files_only=True)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}], tokenize=False
    )
    assert prompt.endswith("<|im_start|>assistant\nHi<|im_end|>\n")
    end_of_turn = tokenizer.convert_tokens_to_ids("<|im_end|>")
    generation = GenerationConfig.from_pretrained(tiny, local_files_only=True)
    assert tokenizer.encode(prompt)[-2] == end_of_turn == generation.eos_token_id == tokenizer.eos_token_id


def test_the_tokenizer_gives_back_what_it_was_given(tiny: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny, local_files_only=True)
    text = "Grüße,  two spaces\n\tand 2025 emoji 🙂."
    assert tokenizer.decode(tokenizer.encode(text)) == text
