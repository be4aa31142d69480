"""An import gives the same bytes every time, offline, whole or not at all."""

import shutil
import socket
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from quantize import base_import
from quantize.base_import import import_base
from quantize.card import WEIGHTS, read_card, verify
from quantize.config import BaseConfig
from quantize.errors import ChecksumMismatch, SourceMissing


def refuse(*args: Any, **kwargs: Any) -> NoReturn:
    raise AssertionError("this must not be called")


def with_source(config: BaseConfig, **changes: str) -> BaseConfig:
    return config.model_copy(update={"gguf": config.gguf.model_copy(update=changes)})


def test_importing_twice_gives_the_same_bytes(tiny: Path, tiny_config: BaseConfig, tmp_path: Path) -> None:
    first, second = verify(tiny), verify(import_base(tiny_config, tmp_path))
    assert second.weights_sha256 == first.weights_sha256
    assert second.files_sha256 == first.files_sha256
    assert second.recipe_sha256 == first.recipe_sha256


def test_importing_disturbs_nobodys_random_numbers(tiny_config: BaseConfig, tmp_path: Path) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    import_base(tiny_config, tmp_path)
    assert torch.equal(torch.rand(3), expected)


def test_a_gguf_with_another_hash_is_refused_before_it_is_loaded(
    tiny_config: BaseConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PreTrainedTokenizerFast, "from_pretrained", refuse)
    with pytest.raises(ChecksumMismatch) as caught:
        import_base(with_source(tiny_config, sha256="0" * 64), tmp_path)
    assert caught.value.actual == tiny_config.gguf.sha256
    assert not (tmp_path / "tiny").exists()


@pytest.mark.parametrize("changes", [{"package": "no_such_package"}, {"file": "other.gguf"}])
def test_a_source_that_is_not_installed_says_what_to_install(
    tiny_config: BaseConfig, tmp_path: Path, changes: dict[str, str]
) -> None:
    with pytest.raises(SourceMissing, match="pip install"):
        import_base(with_source(tiny_config, **changes), tmp_path)


def test_an_interrupted_import_leaves_nothing_visible(
    tiny_config: BaseConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(directory: Path, card: Any) -> NoReturn:
        assert (directory / WEIGHTS).exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(base_import, "write_card", interrupted)
    with pytest.raises(KeyboardInterrupt):
        import_base(tiny_config, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".tiny.lock"]


def test_an_intact_base_is_reused(
    tiny: Path, tiny_config: BaseConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base_import, "staged", refuse)
    assert import_base(tiny_config, tiny.parent) == tiny


def test_a_damaged_base_is_made_again(tiny: Path, tiny_config: BaseConfig, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny, tmp_path / "tiny")
    (copy / WEIGHTS).write_bytes(b"damaged")
    assert verify(import_base(tiny_config, tmp_path)).weights_sha256 == read_card(tiny).weights_sha256


def test_a_base_of_other_settings_is_made_again(tiny: Path, tiny_config: BaseConfig, tmp_path: Path) -> None:
    shutil.copytree(tiny, tmp_path / "tiny")
    assert tiny_config.random_llama is not None
    reseeded = tiny_config.random_llama.model_copy(update={"seed": 1})
    other = import_base(tiny_config.model_copy(update={"random_llama": reseeded}), tmp_path)
    assert verify(other).weights_sha256 != read_card(tiny).weights_sha256


def test_no_network_is_reached(
    tiny_config: BaseConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    import_base(tiny_config, tmp_path)
