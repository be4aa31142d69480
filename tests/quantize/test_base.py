import shutil
import socket
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from quantize import base
from quantize.base import import_base
from quantize.card import WEIGHTS, checkpoint_files, read_card, verify
from quantize.errors import ChecksumMismatch, SourceMissing
from quantize.spec import BaseSpec


def refuse(*args: Any, **kwargs: Any) -> NoReturn:
    raise AssertionError("this must not be called")


def with_source(spec: BaseSpec, **changes: str) -> BaseSpec:
    return spec.model_copy(update={"gguf": spec.gguf.model_copy(update=changes)})


def test_importing_twice_gives_the_same_bytes(tiny: Path, tiny_spec: BaseSpec, tmp_path: Path) -> None:
    first, second = verify(tiny), verify(import_base(tiny_spec, tmp_path))
    assert second.weights_sha256 == first.weights_sha256
    assert second.files_sha256 == first.files_sha256
    assert second.recipe_sha256 == first.recipe_sha256


def test_importing_disturbs_nobodys_random_numbers(tiny_spec: BaseSpec, tmp_path: Path) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    import_base(tiny_spec, tmp_path)
    assert torch.equal(torch.rand(3), expected)


def test_a_gguf_with_another_hash_is_refused_before_it_is_loaded(
    tiny_spec: BaseSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PreTrainedTokenizerFast, "from_pretrained", refuse)
    with pytest.raises(ChecksumMismatch) as caught:
        import_base(with_source(tiny_spec, sha256="0" * 64), tmp_path)
    assert caught.value.actual == tiny_spec.gguf.sha256
    assert not (tmp_path / "tiny").exists()


@pytest.mark.parametrize("changes", [{"package": "no_such_package"}, {"file": "other.gguf"}])
def test_a_source_that_is_not_installed_says_what_to_install(
    tiny_spec: BaseSpec, tmp_path: Path, changes: dict[str, str]
) -> None:
    with pytest.raises(SourceMissing, match="pip install"):
        import_base(with_source(tiny_spec, **changes), tmp_path)


def test_an_interrupted_import_leaves_nothing_visible(
    tiny_spec: BaseSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(directory: Path, card: Any) -> NoReturn:
        assert (directory / WEIGHTS).exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(base, "write_card", interrupted)
    with pytest.raises(KeyboardInterrupt):
        import_base(tiny_spec, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".tiny.lock"]


def test_an_intact_base_is_reused(tiny: Path, tiny_spec: BaseSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "staged", refuse)
    assert import_base(tiny_spec, tiny.parent) == tiny


def test_a_damaged_base_is_made_again(tiny: Path, tiny_spec: BaseSpec, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny, tmp_path / "tiny")
    (copy / WEIGHTS).write_bytes(b"damaged")
    assert verify(import_base(tiny_spec, tmp_path)).weights_sha256 == read_card(tiny).weights_sha256


def test_a_base_of_other_settings_is_made_again(tiny: Path, tiny_spec: BaseSpec, tmp_path: Path) -> None:
    shutil.copytree(tiny, tmp_path / "tiny")
    assert tiny_spec.random_llama is not None
    reseeded = tiny_spec.random_llama.model_copy(update={"seed": 1})
    other = import_base(tiny_spec.model_copy(update={"random_llama": reseeded}), tmp_path)
    assert verify(other).weights_sha256 != read_card(tiny).weights_sha256


def test_no_network_is_reached(tiny_spec: BaseSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    import_base(tiny_spec, tmp_path)


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
